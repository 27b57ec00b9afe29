//! The clock by which certificates begin and end.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// How long to sleep at once: the clock of the wall may be set meanwhile, and certificates go by it.
const LOOK: Duration = Duration::from_secs(30);

/// The clock of the wall. Replaced in tests.
#[derive(Clone)]
pub struct WallClock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl WallClock {
    /// A clock that this function reads.
    pub fn new(read: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self(Arc::new(read))
    }

    pub(crate) fn now(&self) -> SystemTime {
        (self.0)()
    }

    /// Sleeps until this clock says `moment`, however it is set meanwhile.
    pub(crate) async fn wait_until(&self, moment: SystemTime) {
        while let Ok(left) = moment.duration_since(self.now())
            && !left.is_zero()
        {
            tokio::time::sleep(left.min(LOOK)).await;
        }
    }
}

impl Default for WallClock {
    fn default() -> Self {
        Self::new(SystemTime::now)
    }
}

impl fmt::Debug for WallClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WallClock").finish_non_exhaustive()
    }
}
