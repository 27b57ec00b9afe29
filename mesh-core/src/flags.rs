//! Response flags: what the proxy did to a request, in Envoy's short codes (RF-01).
//!
//! A set is one word of bits, so that every layer can add its own without a lock while telemetry reads the whole
//! once, at the end of the body.

use std::fmt;

/// A set of response flags.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct ResponseFlags(u64);

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident = $bit:literal, $code:literal;)*) => {
        impl ResponseFlags {
            $($(#[$doc])* pub const $name: Self = Self(1 << $bit);)*
        }

        /// Every flag with its short code, in Envoy's order.
        const CODES: &[(ResponseFlags, &str)] = &[$((ResponseFlags::$name, $code),)*];
    };
}

flags! {
    /// `LH`: the local service failed its health check.
    FAILED_LOCAL_HEALTH_CHECK = 0, "LH";
    /// `UH`: no healthy upstream.
    NO_HEALTHY_UPSTREAM = 1, "UH";
    /// `UT`: the upstream request timed out.
    UPSTREAM_REQUEST_TIMEOUT = 2, "UT";
    /// `LR`: the connection was reset locally.
    LOCAL_RESET = 3, "LR";
    /// `UR`: the upstream reset the stream.
    UPSTREAM_REMOTE_RESET = 4, "UR";
    /// `UF`: the upstream connection failed.
    UPSTREAM_CONNECTION_FAILURE = 5, "UF";
    /// `UC`: the upstream connection was terminated.
    UPSTREAM_CONNECTION_TERMINATION = 6, "UC";
    /// `UO`: a circuit breaker overflowed.
    UPSTREAM_OVERFLOW = 7, "UO";
    /// `NR`: no route, or no filter chain.
    NO_ROUTE_FOUND = 8, "NR";
    /// `DI`: a delay was injected.
    DELAY_INJECTED = 9, "DI";
    /// `FI`: a fault was injected.
    FAULT_INJECTED = 10, "FI";
    /// `RL`: rate limited.
    RATE_LIMITED = 11, "RL";
    /// `UAEX`: denied by the external authorization service.
    UNAUTHORIZED_EXTERNAL_SERVICE = 12, "UAEX";
    /// `RLSE`: the rate limit service failed.
    RATE_LIMIT_SERVICE_ERROR = 13, "RLSE";
    /// `DC`: the downstream connection was terminated.
    DOWNSTREAM_CONNECTION_TERMINATION = 14, "DC";
    /// `URX`: the retry limit was exceeded.
    UPSTREAM_RETRY_LIMIT_EXCEEDED = 15, "URX";
    /// `SI`: the stream was idle for too long.
    STREAM_IDLE_TIMEOUT = 16, "SI";
    /// `IH`: a header that is checked strictly had an invalid value.
    INVALID_ENVOY_REQUEST_HEADERS = 17, "IH";
    /// `DPE`: the downstream broke the protocol.
    DOWNSTREAM_PROTOCOL_ERROR = 18, "DPE";
    /// `UMSDR`: the request took longer than its maximum stream duration.
    UPSTREAM_MAX_STREAM_DURATION_REACHED = 19, "UMSDR";
    /// `RFCF`: the response came from a cache filter.
    RESPONSE_FROM_CACHE_FILTER = 20, "RFCF";
    /// `NFCF`: a filter's configuration was not there.
    NO_FILTER_CONFIG_FOUND = 21, "NFCF";
    /// `DT`: the request or connection exceeded its maximum duration.
    DURATION_TIMEOUT = 22, "DT";
    /// `UPE`: the upstream broke the protocol.
    UPSTREAM_PROTOCOL_ERROR = 23, "UPE";
    /// `NC`: the cluster of the route is not known.
    NO_CLUSTER_FOUND = 24, "NC";
    /// `OM`: the overload manager stopped the request.
    OVERLOAD_MANAGER = 25, "OM";
    /// `DF`: DNS resolution failed.
    DNS_RESOLUTION_FAILED = 26, "DF";
    /// `DO`: dropped, as an overload configuration asked.
    DROP_OVERLOAD = 27, "DO";
    /// `DRR`: the downstream reset the stream.
    DOWNSTREAM_REMOTE_RESET = 28, "DRR";
    /// `UDR`: unconditionally dropped.
    UNCONDITIONAL_DROP_OVERLOAD = 29, "UDR";
}

impl ResponseFlags {
    /// No flag.
    pub const NONE: Self = Self(0);

    /// Whether no flag is set.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether every flag of `other` is set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The union of both.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The short codes of the flags that are set, in Envoy's order.
    pub fn codes(self) -> impl Iterator<Item = &'static str> {
        CODES.iter().filter(move |(flag, _)| self.contains(*flag)).map(|(_, code)| *code)
    }

    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    pub(crate) const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

impl std::ops::BitOr for ResponseFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        self.union(other)
    }
}

/// The short codes with commas between them; `-` when no flag is set.
impl fmt::Display for ResponseFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("-");
        }
        for (index, code) in self.codes().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            f.write_str(code)?;
        }
        Ok(())
    }
}

impl fmt::Debug for ResponseFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ResponseFlags({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rf_01_codes_are_envoys_and_comma_separated() {
        assert_eq!(ResponseFlags::NONE.to_string(), "-");
        let both = ResponseFlags::UPSTREAM_CONNECTION_FAILURE | ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED;
        assert_eq!(both.to_string(), "UF,URX");
        assert!(both.contains(ResponseFlags::UPSTREAM_CONNECTION_FAILURE));
        assert!(!both.contains(ResponseFlags::NO_ROUTE_FOUND));
    }

    #[test]
    fn every_flag_has_its_own_bit_and_code() {
        let mut bits = 0;
        let mut codes = std::collections::HashSet::new();
        for (flag, code) in CODES {
            assert_eq!(bits & flag.0, 0, "{code} shares a bit");
            bits |= flag.0;
            assert!(codes.insert(code), "{code} stands twice");
        }
    }
}
