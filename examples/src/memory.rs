//! What a load takes for a moment does not stay.
//!
//! The resources of a large mesh take as much memory as what is compiled from them, and are let go when it is. glibc gives
//! back whole pages only, and what is compiled would fill the gaps of what was parsed, so that hardly a page became free.
//! A thread of its own allocates from an arena of its own. mimalloc was measured in the place of glibc's allocator and kept
//! more: `benches/README.md`.

use std::panic::resume_unwind;
use std::thread;

/// Runs `work` on a thread of its own, so that what it allocates lies apart from what the caller allocates after it.
pub(crate) fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|panic| resume_unwind(panic))
}

/// Keeps large blocks (128 KiB and more) out of the heap for good: files are read again and again. Left alone, glibc puts
/// them into it as soon as one was freed, and there they stay. Called once, before threads start.
pub(crate) fn large_blocks_apart() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: a call without pointers; a value that the allocator refuses changes nothing.
        #[allow(unsafe_code)]
        let _ = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 128 * 1024) };
    }
}

/// Returns the free pages of the allocator to the system; does nothing where the C library is not glibc.
///
/// It takes the lock of each arena in turn, so it is for after a load, not for the request path.
pub(crate) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: a call without pointers, which glibc documents as safe among threads.
        #[allow(unsafe_code)]
        let _ = unsafe { libc::malloc_trim(0) };
    }
}
