//! How many streams the peer allows, heard where it says so: in the bytes that are read from it.
//!
//! hyper drives a connection in a task of its own and tells whoever holds the connection of new settings only when that
//! one is polled for another reason, such as the next request. A request that is let onto a connection by a limit that
//! no longer holds waits there for another's end; one that waits for a limit to rise is not told that it has. So the
//! transport looks for SETTINGS frames while their bytes pass. What is no such frame is skipped by its length.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};

use pin_project::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

use crate::pool::Slot;

const SETTINGS: u8 = 4;
const ACK: u8 = 1;
const MAX_CONCURRENT_STREAMS: u16 = 3;

/// A transport that publishes how many streams the peer allows.
#[pin_project]
pub(super) struct Watched<T> {
    #[pin]
    inner: T,
    /// Counts the connection for as long as there is one: its streams may outlive what drives it.
    _slot: Slot,
    frames: Frames,
    allowed: Arc<AtomicU32>,
    /// Told when more are allowed than were.
    changed: Arc<Notify>,
}

impl<T> Watched<T> {
    pub(super) fn new(inner: T, slot: Slot, allowed: Arc<AtomicU32>, changed: Arc<Notify>) -> Self {
        Self { inner, _slot: slot, frames: Frames::default(), allowed, changed }
    }
}

/// Where in the frames the bytes are.
#[derive(Debug, Default)]
struct Frames {
    /// The head of a frame or a setting, as far as it has come.
    part: [u8; 9],
    have: usize,
    /// What of the payload is still to come.
    left: usize,
    settings: bool,
}

impl Frames {
    /// Goes on over these bytes; the last limit on streams that they set.
    fn read(&mut self, mut bytes: &[u8]) -> Option<u32> {
        let mut limit = None;
        while let Some(first) = bytes.first() {
            if self.left > 0 && !self.settings {
                let skipped = self.left.min(bytes.len());
                self.left -= skipped;
                bytes = &bytes[skipped..];
                continue;
            }
            self.part[self.have] = *first;
            self.have += 1;
            bytes = &bytes[1..];
            if self.left > 0 {
                self.left -= 1;
                if let (6, [id0, id1, value @ .., _, _, _]) = (self.have, self.part) {
                    self.have = 0;
                    if u16::from_be_bytes([id0, id1]) == MAX_CONCURRENT_STREAMS {
                        limit = Some(u32::from_be_bytes(value));
                    }
                }
                if self.left == 0 {
                    self.have = 0;
                }
            } else if let (9, [l0, l1, l2, kind, flags, ..]) = (self.have, self.part) {
                self.have = 0;
                self.left = u32::from_be_bytes([0, l0, l1, l2]) as usize;
                self.settings = kind == SETTINGS && flags & ACK == 0;
            }
        }
        limit
    }
}

impl<T: AsyncRead> AsyncRead for Watched<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.project();
        let before = buffer.filled().len();
        let read = this.inner.poll_read(cx, buffer);
        if let Some(limit) = this.frames.read(buffer.filled().get(before..).unwrap_or_default())
            && this.allowed.swap(limit, Ordering::Relaxed) < limit
        {
            this.changed.notify_waiters();
        }
        read
    }
}

impl<T: AsyncWrite> AsyncWrite for Watched<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.project().inner.poll_write(cx, data)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.project().inner.poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().inner.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().inner.poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[length[1], length[2], length[3], kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn setting(id: u16, value: u32) -> Vec<u8> {
        [&id.to_be_bytes()[..], &value.to_be_bytes()[..]].concat()
    }

    #[test]
    fn a10_limits_are_found_however_the_bytes_are_cut() {
        let bytes = [
            frame(SETTINGS, 0, &[setting(4, 70_000), setting(3, 100), setting(5, 20_000)].concat()),
            frame(SETTINGS, ACK, &[]),
            // What looks like a setting is none within another frame.
            frame(0, 0, &frame(SETTINGS, 0, &setting(3, 9))),
            frame(SETTINGS, 0, &[]),
            frame(SETTINGS, 0, &setting(4, 1)),
            frame(1, 4, &[0x88]),
            frame(SETTINGS, 0, &[setting(3, 7), setting(3, 0)].concat()),
            frame(0, 1, &[]),
        ]
        .concat();
        for size in 1..=bytes.len() {
            let mut frames = Frames::default();
            let found: Vec<_> = bytes.chunks(size).filter_map(|chunk| frames.read(chunk)).collect();
            assert_eq!(found.last(), Some(&0), "in pieces of {size}");
            assert!(found.iter().all(|limit| [100, 7, 0].contains(limit)), "{found:?} in pieces of {size}");
            assert_eq!((frames.have, frames.left), (0, 0));
        }
    }

    #[test]
    fn a_payload_that_is_no_list_of_settings_ends_with_its_frame() {
        let mut frames = Frames::default();
        let bytes = [frame(SETTINGS, 0, &[0, 3, 0]), frame(SETTINGS, 0, &setting(3, 5))].concat();
        assert_eq!(frames.read(&bytes), Some(5));
    }
}
