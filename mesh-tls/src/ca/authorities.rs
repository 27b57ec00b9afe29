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

use super::{Authority, CaError};

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
}

/// A rotation is not over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the rotation before this one is not over")]
pub struct RotationUnderWay;

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
    pub fn allow_leaf(&mut self, life: Duration) -> bool {
        let longer = life > self.longest_leaf;
        self.longest_leaf = self.longest_leaf.max(life);
        longer
    }

    /// Begins a rotation.
    ///
    /// # Errors
    /// When one is under way.
    pub fn rotate(&mut self, next: Authority) -> Result<(), RotationUnderWay> {
        if self.next.is_some() {
            return Err(RotationUnderWay);
        }
        self.next = Some(Next { authority: next, announced: None });
        Ok(())
    }

    /// Notes that a new authority is handed out from now on. True when that is news.
    pub fn announce(&mut self, now: SystemTime) -> bool {
        match &mut self.next {
            Some(Next { announced: announced @ None, .. }) => {
                *announced = Some(now);
                true
            }
            _ => false,
        }
    }

    /// Ends a rotation whose time has come: the old authority is gone. True when it has.
    pub fn retire(&mut self, now: SystemTime) -> bool {
        let Some(next) = self.next.take() else { return false };
        if self.ends(&next).is_some_and(|end| end <= now) {
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
            Some(next) if self.begins(next).is_some_and(|begin| begin <= now) => &next.authority,
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
            Some(next) if self.old.not_after() <= now && next.announced.is_some() => &next.authority,
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
            Rotation::None | Rotation::Made => None,
        }
    }

    /// When the new authority begins to sign: earlier than everybody knows of it only when the old one cannot any more.
    fn begins(&self, next: &Next) -> Option<SystemTime> {
        let all_told = next.announced? + self.longest_leaf + ROUNDING;
        Some(all_told.min(self.old.not_after().max(next.announced?)))
    }

    fn ends(&self, next: &Next) -> Option<SystemTime> {
        Some(self.begins(next)? + self.longest_leaf + ROUNDING)
    }
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
        both.rotate(next).unwrap();
        assert_eq!(both.rotate(authority(now, HOUR)), Err(RotationUnderWay));
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
        both.rotate(authority(now, 100 * HOUR)).unwrap();
        both.announce(now);
        let new = both.next().unwrap().0.root().to_vec();
        let old = both.old().root().to_vec();
        let end = both.old().not_after();
        assert_eq!(both.signing(end - SECOND).root().to_vec(), old);
        assert_eq!(both.signing(end).root().to_vec(), new);
        assert_eq!(both.known_by_all(end).root().to_vec(), new);
        // Announced after that end, it signs at once.
        let mut late = Authorities::new(authority(now, HOUR), 24 * HOUR);
        late.rotate(authority(now, 100 * HOUR)).unwrap();
        late.announce(now + 2 * HOUR);
        assert_ne!(late.signing(now + 2 * HOUR).root().to_vec(), late.old().root().to_vec());
    }

    #[test]
    fn the_longest_leaf_never_shrinks_and_trust_domains_do_not_mix() {
        let now = SystemTime::now();
        let mut one = Authorities::new(authority(now, HOUR), HOUR);
        assert!(!one.allow_leaf(HOUR / 2) && one.allow_leaf(2 * HOUR));
        assert_eq!(one.longest_leaf(), 2 * HOUR);
        let other = Authority::new("example.org".parse().unwrap(), now, HOUR).unwrap();
        assert!(one.with_next(other, None).is_err());
    }
}
