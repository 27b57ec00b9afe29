//! Which Istio is meant, where its semantics changed.

use std::fmt;
use std::str::FromStr;

/// The version of Istio whose semantics are enforced.
///
/// Eight semantics changed between 1.1 and 1.31: default retries, the mirror's host suffix, the outlier trigger,
/// the default balancer, the panic threshold, the default pool limits, the authorization kinds and the metric names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compat {
    /// Istio 1.31.
    #[default]
    Current,
    /// Istio 1.1.
    V1_1,
}

impl Compat {
    /// As the command line takes it: `current` or `1.1`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::V1_1 => "1.1",
        }
    }
}

impl fmt::Display for Compat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Compat {
    type Err = UnknownCompat;

    fn from_str(text: &str) -> Result<Self, UnknownCompat> {
        match text {
            "current" => Ok(Self::Current),
            "1.1" => Ok(Self::V1_1),
            _ => Err(UnknownCompat),
        }
    }
}

/// The text names no version that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected `current` or `1.1`")]
pub struct UnknownCompat;
