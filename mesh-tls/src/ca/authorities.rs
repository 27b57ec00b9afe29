//! How a root is replaced without anybody being refused (D2).
//!
//! A new root is believed before it signs, and the old one until the last certificate that it signed is over:
//!
//! | phase | who signs | who is believed | it lasts |
//! |---|---|---|---|
//! | announced | the old one | both | one life of a leaf: then every workload has been told of the new one |
//! | overlap | the new one | both | one life of a leaf: then nothing is left that the old one signed |
//! | over | the new one | the new one | |
//!
//! Workloads hear whom to believe with each certificate that they get. So the first phase begins when the new root is
//! first handed out, which is for whoever hands it out to say ([`Authorities::announce`]), and not when it is made.
//! Pure: the time is an argument, and who keeps the authorities asks again at [`Authorities::next_change`].

use std::time::{Duration, SystemTime};

use super::{Authority, CaError, last};

/// What a certificate may live longer than was asked for: its times are in whole seconds.
const ROUNDING: Duration = Duration::from_secs(1);

/// The authorities of a trust domain: the one that signs, and during a rotation a second one.
#[derive(Debug)]
pub struct Authorities {
    old: Authority,
    next: Option<Next>,
    longest_leaf: Duration,
}

#[derive(Debug)]
struct Next {
    authority: Authority,
    announced: Option<SystemTime>,
}

/// Where a rotation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rotation {
    /// There is none.
    None,
    /// There is a new authority, which nobody has been told of.
    Made,
    /// The new authority is believed, and signs from this moment.
    Announced(SystemTime),
    /// The new authority signs, and the old one is believed until this moment.
    Overlap(SystemTime),
    /// The new authority ends before the rotation would: the old one goes on, and another new one may take its place.
    TooShort,
}

/// Why no rotation begins, or a leaf may not live so long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CannotRotate {
    /// The one before is not over.
    #[error("the rotation before this one is not over")]
    UnderWay,
    /// The new root would be over before the last certificate of the old one is.
    #[error("the new root has to live for more than {0:?}: two lives of the longest certificate")]
    TooShort(Duration),
}

impl Authorities {
    /// One authority, whose leaves live for `longest_leaf` at most.
    #[must_use]
    pub const fn new(authority: Authority, longest_leaf: Duration) -> Self {
        Self { old: authority, next: None, longest_leaf }
    }

    /// Adds a new authority, with the moment at which it was announced, where it was. Both must be of one trust domain.
    ///
    /// # Errors
    /// When it is of another one.
    pub fn with_next(mut self, next: Authority, announced: Option<SystemTime>) -> Result<Self, CaError> {
        if next.trust_domain() != self.old.trust_domain() {
            return Err(CaError::Authority(format!(
                "it is of {}, and the one before of {}",
                next.trust_domain(),
                self.old.trust_domain()
            )));
        }
        self.next = Some(Next { authority: next, announced });
        Ok(self)
    }

    /// The authority that was there first.
    #[must_use]
    pub const fn old(&self) -> &Authority {
        &self.old
    }

    /// The one that takes its place, with the moment at which it was announced.
    #[must_use]
    pub fn next(&self) -> Option<(&Authority, Option<SystemTime>)> {
        self.next.as_ref().map(|next| (&next.authority, next.announced))
    }

    /// The longest life of a leaf.
    #[must_use]
    pub const fn longest_leaf(&self) -> Duration {
        self.longest_leaf
    }

    /// Leaves may live for so long from now on. It never shrinks, as older ones are out. True when that is news.
    ///
    /// # Errors
    /// [`CannotRotate::TooShort`] when the new root of a rotation would be over before such a leaf is; nothing changes.
    pub fn allow_leaf(&mut self, life: Duration) -> Result<bool, CannotRotate> {
        if life <= self.longest_leaf {
            return Ok(false);
        }
        let room = self.next.as_ref().filter(|next| self.has_room(next)).and_then(|next| {
            let from = next.announced?;
            Some(next.authority.not_after() >= after(from, rotation_of(life)))
        });
        if room == Some(false) {
            return Err(CannotRotate::TooShort(rotation_of(life)));
        }
        self.longest_leaf = life;
        Ok(true)
    }

    /// Begins a rotation. The new root is to outlive it: two lives of the longest leaf. One whose new root does not is
    /// replaced.
    ///
    /// # Errors
    /// When one is under way, or the root is too short.
    pub fn rotate(&mut self, next: Authority, now: SystemTime) -> Result<(), CannotRotate> {
        if self.next.as_ref().is_some_and(|next| self.can_follow(next, now)) {
            return Err(CannotRotate::UnderWay);
        }
        let next = Next { authority: next, announced: None };
        if !self.can_follow(&next, now) {
            return Err(CannotRotate::TooShort(rotation_of(self.longest_leaf)));
        }
        self.next = Some(next);
        Ok(())
    }

    /// Notes that a new authority is handed out from now on. True when that is news; one that ends too soon is not
    /// handed out.
    pub fn announce(&mut self, now: SystemTime) -> bool {
        let can_follow = self.next.as_ref().is_some_and(|next| self.can_follow(next, now));
        match &mut self.next {
            Some(Next { announced: announced @ None, .. }) if can_follow => {
                *announced = Some(now);
                true
            }
            _ => false,
        }
    }

    /// Ends a rotation whose time has come: the old authority is gone. True when it has.
    ///
    /// The old key cannot be had back, and those whom it signed for are refused: a caller whose clock may be wrong for a
    /// moment asks again later before it believes that the time has come.
    pub fn retire(&mut self, now: SystemTime) -> bool {
        let Some(next) = self.next.take() else { return false };
        if self.signs(&next, now) && self.ends(&next).is_some_and(|end| end <= now) {
            self.old = next.authority;
            return true;
        }
        self.next = Some(next);
        false
    }

    /// Where the rotation stands.
    #[must_use]
    pub fn rotation(&self, now: SystemTime) -> Rotation {
        let Some(next) = &self.next else { return Rotation::None };
        if !self.can_follow(next, now) {
            return Rotation::TooShort;
        }
        match (self.begins(next), self.ends(next)) {
            (Some(begin), _) if now < begin => Rotation::Announced(begin),
            (_, Some(end)) => Rotation::Overlap(end),
            _ => Rotation::Made,
        }
    }

    /// Who signs.
    #[must_use]
    pub fn signing(&self, now: SystemTime) -> &Authority {
        match &self.next {
            Some(next) if self.signs(next, now) => &next.authority,
            _ => &self.old,
        }
    }

    /// Who is believed, the oldest first.
    pub fn trusted(&self) -> impl Iterator<Item = &Authority> {
        let next = self.next.as_ref().filter(|next| next.announced.is_some());
        std::iter::once(&self.old).chain(next.map(|next| &next.authority))
    }

    /// Whom all who have been told anything of late believe, and so who signs for what they meet first: the authority's own
    /// server.
    #[must_use]
    pub fn known_by_all(&self, now: SystemTime) -> &Authority {
        match &self.next {
            Some(next) if self.old.not_after() <= now && self.signs(next, now) => &next.authority,
            _ => &self.old,
        }
    }

    /// The certificates of those who are believed, in PEM.
    #[must_use]
    pub fn roots_pem(&self) -> String {
        self.trusted().map(Authority::root_pem).collect()
    }

    /// When something of this changes by itself.
    #[must_use]
    pub fn next_change(&self, now: SystemTime) -> Option<SystemTime> {
        match self.rotation(now) {
            Rotation::Announced(at) | Rotation::Overlap(at) => Some(at),
            Rotation::None | Rotation::Made | Rotation::TooShort => None,
        }
    }

    /// Whether the new authority outlives the rotation, counted from when it was announced.
    fn has_room(&self, next: &Next) -> bool {
        next.announced
            .is_none_or(|at| next.authority.not_after() >= after(at, rotation_of(self.longest_leaf)))
    }

    /// Whether the new authority may take the old one's place, where nobody was told of it from now on.
    fn can_follow(&self, next: &Next, now: SystemTime) -> bool {
        let end = next.authority.not_after();
        let from_now = next.announced.is_some() || end >= after(now, rotation_of(self.longest_leaf));
        now < end && from_now && self.has_room(next)
    }

    /// Whether the new authority signs: when its time has come and it is valid. One that ends too soon does so only where
    /// the old one cannot any more.
    fn signs(&self, next: &Next, now: SystemTime) -> bool {
        let begun = self.begins(next).is_some_and(|begin| begin <= now);
        begun && now < next.authority.not_after() && (self.has_room(next) || self.old.not_after() <= now)
    }

    /// When the new authority begins to sign: earlier than everybody knows of it only when the old one cannot any more.
    fn begins(&self, next: &Next) -> Option<SystemTime> {
        let all_told = after(next.announced?, self.longest_leaf.saturating_add(ROUNDING));
        Some(all_told.min(self.old.not_after().max(next.announced?)))
    }

    fn ends(&self, next: &Next) -> Option<SystemTime> {
        Some(after(self.begins(next)?, self.longest_leaf.saturating_add(ROUNDING)))
    }
}

/// How long a rotation takes from when the new root is handed out.
const fn rotation_of(longest_leaf: Duration) -> Duration {
    longest_leaf.saturating_add(ROUNDING).saturating_mul(2)
}

/// So much later; never after what a certificate can say.
fn after(at: SystemTime, time: Duration) -> SystemTime {
    at.checked_add(time).map_or_else(last, |later| later.min(last()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const SECOND: Duration = Duration::from_secs(1);

    fn authority(now: SystemTime, life: Duration) -> Authority {
        Authority::new("cluster.local".parse().unwrap(), now, life).unwrap()
    }

    fn roots(authorities: &Authorities) -> Vec<Vec<u8>> {
        authorities.trusted().map(|authority| authority.root().to_vec()).collect()
    }

    #[test]
    fn d2_a_new_root_is_believed_before_it_signs_and_the_old_one_until_its_last_leaf_is_over() {
        let now = SystemTime::now();
        let mut both = Authorities::new(authority(now, 1000 * HOUR), 24 * HOUR);
        let old = both.old().root().to_vec();
        let next = authority(now, 1000 * HOUR);
        let new = next.root().to_vec();
        both.rotate(next, now).unwrap();
        assert_eq!(both.rotate(authority(now, 1000 * HOUR), now), Err(CannotRotate::UnderWay));
        // Nobody has been told: nothing changes, however long that lasts.
        let much_later = now + 100 * HOUR;
        assert_eq!(both.rotation(much_later), Rotation::Made);
        assert_eq!(
            (roots(&both), both.signing(much_later).root().to_vec()),
            (vec![old.clone()], old.clone())
        );

        assert!(both.announce(now) && !both.announce(now + HOUR));
        let signs = now + 24 * HOUR + SECOND;
        assert_eq!(both.rotation(now), Rotation::Announced(signs));
        assert_eq!(both.next_change(now), Some(signs));
        assert_eq!(roots(&both), [old.clone(), new.clone()]);
        assert_eq!(both.signing(signs - SECOND).root().to_vec(), old);
        assert_eq!(both.signing(signs).root().to_vec(), new);
        // What the old one signed last is over before it is forgotten.
        let last = both.signing(signs - SECOND).issue(
            &"spiffe://cluster.local/ns/a/sa/b".parse().unwrap(),
            signs - SECOND,
            24 * HOUR,
        );
        let end = signs + 24 * HOUR + SECOND;
        assert!(last.unwrap().certificate.not_after <= end);
        assert_eq!(both.rotation(signs), Rotation::Overlap(end));
        assert_eq!(both.known_by_all(end - SECOND).root().to_vec(), old);
        assert!(!both.retire(end - SECOND) && both.retire(end) && !both.retire(end));
        assert_eq!((roots(&both), both.signing(end).root().to_vec()), (vec![new.clone()], new));
        assert_eq!(both.rotation(end), Rotation::None);
    }

    #[test]
    fn d2_an_old_root_that_is_over_signs_no_more_and_the_new_one_does_sooner() {
        let now = SystemTime::now();
        let mut both = Authorities::new(authority(now, HOUR), 24 * HOUR);
        both.rotate(authority(now, 100 * HOUR), now).unwrap();
        both.announce(now);
        let new = both.next().unwrap().0.root().to_vec();
        let old = both.old().root().to_vec();
        let end = both.old().not_after();
        assert_eq!(both.signing(end - SECOND).root().to_vec(), old);
        assert_eq!(both.signing(end).root().to_vec(), new);
        assert_eq!(both.known_by_all(end).root().to_vec(), new);
        // Announced after that end, it signs at once.
        let mut late = Authorities::new(authority(now, HOUR), 24 * HOUR);
        late.rotate(authority(now, 100 * HOUR), now).unwrap();
        late.announce(now + 2 * HOUR);
        assert_ne!(late.signing(now + 2 * HOUR).root().to_vec(), late.old().root().to_vec());
    }

    #[test]
    fn the_longest_leaf_never_shrinks_and_trust_domains_do_not_mix() {
        let now = SystemTime::now();
        let mut one = Authorities::new(authority(now, HOUR), HOUR);
        assert_eq!((one.allow_leaf(HOUR / 2), one.allow_leaf(2 * HOUR)), (Ok(false), Ok(true)));
        assert_eq!(one.longest_leaf(), 2 * HOUR);
        let other = Authority::new("example.org".parse().unwrap(), now, HOUR).unwrap();
        assert!(one.with_next(other, None).is_err());
    }

    #[test]
    fn bug_a_new_root_that_ended_within_the_overlap_took_the_mesh_down() {
        let now = SystemTime::now();
        let mut both = Authorities::new(authority(now, 1000 * HOUR), 24 * HOUR);
        let needed = 2 * (24 * HOUR + SECOND);
        assert_eq!(both.rotate(authority(now, HOUR), now), Err(CannotRotate::TooShort(needed)));
        assert_eq!(both.rotate(authority(now, needed - SECOND), now), Err(CannotRotate::TooShort(needed)));
        assert_eq!(both.rotation(now), Rotation::None);

        // One that somebody made nevertheless never signs while the old one can, and is replaced.
        let short = authority(now, 30 * HOUR);
        let mut both = both.with_next(short, Some(now)).unwrap();
        let old = both.old().root().to_vec();
        for hours in [0, 25, 29, 31, 100] {
            let at = now + hours * HOUR;
            assert_eq!(both.signing(at).root().to_vec(), old, "{hours}");
            assert_eq!((both.rotation(at), both.retire(at)), (Rotation::TooShort, false), "{hours}");
        }
        both.rotate(authority(now, 1000 * HOUR), now).unwrap();
        assert_eq!(both.rotation(now), Rotation::Made);

        // Nor is one handed out that has become too short while it waited, and leaves do not outgrow it.
        assert!(!both.announce(now + 960 * HOUR) && both.announce(now));
        assert_eq!(both.allow_leaf(600 * HOUR), Err(CannotRotate::TooShort(2 * (600 * HOUR + SECOND))));
        assert_eq!(
            (both.longest_leaf(), both.rotation(now)),
            (24 * HOUR, Rotation::Announced(now + 24 * HOUR + SECOND))
        );
        assert_eq!(both.allow_leaf(400 * HOUR), Ok(true));
    }

    #[test]
    fn bug_a_leaf_without_end_was_a_panic() {
        let now = SystemTime::now();
        let both = Authorities::new(authority(now, HOUR), Duration::MAX);
        let both = both.with_next(authority(now, HOUR), Some(now)).unwrap();
        assert_eq!(both.rotation(now), Rotation::TooShort);
        assert_eq!(both.signing(now).root(), both.old().root());
    }
}
