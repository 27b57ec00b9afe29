//! What a load takes for a moment does not stay.
//!
//! The resources of a large mesh take as much memory as what is compiled from them, and are let go when it is. glibc gives
//! back whole pages only, and what is compiled would fill the gaps of what was parsed, so that hardly a page became free.
//! A thread of its own has an arena of its own, as long as glibc has one left, so what it allocates lies apart; the next
//! load uses it again. mimalloc was measured in the place of glibc's allocator and kept more: `benches/README.md`.

use std::panic::resume_unwind;
use std::thread;

/// Runs `work` on a thread of its own, so that what it allocates lies apart from what the caller allocates after it. Where
/// no thread can be had it runs here.
pub(crate) fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    on_a_thread_of(thread::Builder::new().name("mesh-load".to_owned()), work)
}

fn on_a_thread_of<T: Send>(builder: thread::Builder, work: impl FnOnce() -> T + Send) -> T {
    let (mut work, mut done) = (Some(work), None);
    thread::scope(|scope| {
        let run = || done = work.take().map(|work| work());
        if let Ok(Err(panic)) = builder.spawn_scoped(scope, run).map(thread::ScopedJoinHandle::join) {
            resume_unwind(panic);
        }
    });
    match (done, work) {
        (Some(done), _) => done,
        (None, Some(work)) => work(),
        (None, None) => unreachable!("the thread took the work and did not panic"),
    }
}

/// Returns the free pages of the allocator to the system; does nothing where the C library is not glibc.
///
/// It holds the lock of each arena in turn while it does: for a moment when nobody is served yet.
pub(crate) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: a call without pointers, which glibc documents as safe among threads.
        #[allow(unsafe_code)]
        let _ = unsafe { libc::malloc_trim(0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_that_gets_no_thread_ran_into_a_panic() {
        let here = thread::current().id();
        assert_ne!(apart(|| thread::current().id()), here);
        // A stack that no system has room for.
        let impossible = thread::Builder::new().stack_size(1 << 60);
        assert_eq!(on_a_thread_of(impossible, || thread::current().id()), here);
    }

    #[test]
    #[should_panic(expected = "the load's own")]
    fn a_panic_is_passed_on() {
        apart(|| panic!("the load's own"));
    }
}
