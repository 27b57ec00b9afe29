//! Keeping the beginning of a body while it passes.
//!
//! It is copied, not shared: pieces are parts of larger buffers, which would live as long, and small ones cost more
//! than their bytes. What is kept takes what it is bounded to.

use bytes::Bytes;
use mesh_core::{BodyHook, EndOfBody};

/// What was kept of a body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Kept {
    /// Its beginning.
    pub(super) body: Bytes,
    /// Whether there was more.
    pub(super) cut: bool,
}

/// The beginning of a body, up to a bound.
#[derive(Debug)]
pub(super) struct Keeping {
    most: usize,
    body: Vec<u8>,
    cut: bool,
}

impl Keeping {
    pub(super) const fn new(most: usize) -> Self {
        Self { most, body: Vec::new(), cut: false }
    }

    pub(super) fn push(&mut self, data: &Bytes) {
        let room = self.most - self.body.len();
        self.cut |= data.len() > room;
        self.body.extend_from_slice(&data[..data.len().min(room)]);
    }

    pub(super) fn finish(self) -> Kept {
        Kept { body: self.body.into(), cut: self.cut }
    }
}

/// A hook that keeps what passes, and says so when all of it has. What broke off it does not tell of.
pub(super) struct Capture<F: FnOnce(Kept)> {
    keeping: Keeping,
    then: Option<F>,
}

impl<F: FnOnce(Kept)> Capture<F> {
    pub(super) const fn new(most: usize, then: F) -> Self {
        Self { keeping: Keeping::new(most), then: Some(then) }
    }
}

impl<F: FnOnce(Kept) + Send + 'static> BodyHook for Capture<F> {
    fn on_data(&mut self, data: &Bytes) {
        self.keeping.push(data);
    }

    fn on_end(&mut self, end: EndOfBody<'_>) {
        let keeping = std::mem::replace(&mut self.keeping, Keeping::new(0));
        let then = self.then.take();
        if let (EndOfBody::Complete, Some(then)) = (end, then) {
            then(keeping.finish());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vs_p05_bodies_are_kept_up_to_the_bound() {
        let kept = |pieces: &[&'static str]| {
            let mut keeping = Keeping::new(4);
            pieces.iter().for_each(|piece| keeping.push(&Bytes::from_static(piece.as_bytes())));
            let Kept { body, cut } = keeping.finish();
            (String::from_utf8(body.into()).unwrap(), cut)
        };
        assert_eq!(kept(&[]), (String::new(), false));
        assert_eq!(kept(&["ab", "cd"]), ("abcd".to_owned(), false));
        assert_eq!(kept(&["abc", "de", "f"]), ("abcd".to_owned(), true));
    }
}
