//! Faults that a caller orders by Envoy's headers (VS-F05).

use std::str::FromStr;
use std::time::Duration;

use http::HeaderMap;
use mesh_core::vendor::{self, Header};

use super::{Abort, AbortKind, Delay, grpc_abort, http_abort};
use crate::percentage::Percentage;

/// The delay that these headers order.
pub(super) fn delay(headers: &HeaderMap) -> Option<Delay> {
    let duration = Duration::from_millis(number(headers, vendor::FAULT_DELAY_REQUEST)?);
    Some(Delay { duration, percentage: percentage(headers, vendor::FAULT_DELAY_REQUEST_PERCENTAGE) })
}

/// The abort that these headers order.
pub(super) fn abort(headers: &HeaderMap) -> Option<Abort> {
    let http = || -> Option<AbortKind> { number(headers, vendor::FAULT_ABORT_REQUEST).and_then(http_abort) };
    let grpc = || number(headers, vendor::FAULT_ABORT_GRPC_REQUEST).and_then(grpc_abort);
    let kind = http().or_else(grpc)?;
    Some(Abort { kind, percentage: percentage(headers, vendor::FAULT_ABORT_REQUEST_PERCENTAGE) })
}

fn percentage(headers: &HeaderMap, header: Header) -> Percentage {
    number(headers, header).map_or(Percentage::ALWAYS, |percent: u32| {
        Percentage::from_millionths(percent.saturating_mul(10_000))
    })
}

/// The first value of a header, as Envoy takes it.
fn number<T: FromStr>(headers: &HeaderMap, header: Header) -> Option<T> {
    header.get(headers)?.to_str().ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    const DELAY: &str = "x-envoy-fault-delay-request";
    const DELAY_PERCENTAGE: &str = "x-envoy-fault-delay-request-percentage";
    const ABORT: &str = "x-envoy-fault-abort-request";
    const ABORT_GRPC: &str = "x-envoy-fault-abort-grpc-request";
    const ABORT_PERCENTAGE: &str = "x-envoy-fault-abort-request-percentage";

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn vs_f05_what_the_headers_order() {
        let of = |pairs| delay(&headers(pairs)).map(|d| (d.duration.as_millis(), d.percentage.millionths()));
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[(DELAY, "250")]), Some((250, 1_000_000)));
        assert_eq!(of(&[(DELAY, "250"), (DELAY_PERCENTAGE, "25")]), Some((250, 250_000)));
        assert_eq!(of(&[(DELAY, "250"), (DELAY_PERCENTAGE, "400")]), Some((250, 1_000_000)));
        assert_eq!(of(&[(DELAY, "250"), (DELAY_PERCENTAGE, "many")]), Some((250, 1_000_000)));
        assert_eq!(of(&[(DELAY_PERCENTAGE, "25")]), None);
        for wrong in ["", "soon", "-1", "1s", "1.5"] {
            let mut headers = HeaderMap::new();
            headers.insert(DELAY, HeaderValue::from_static(wrong));
            assert_eq!(delay(&headers), None, "{wrong}");
        }

        let of = |pairs| abort(&headers(pairs)).map(|a| (a.kind.to_string(), a.percentage.millionths()));
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[(ABORT, "503")]), Some(("503".to_owned(), 1_000_000)));
        assert_eq!(of(&[(ABORT, "199")]), None);
        assert_eq!(of(&[(ABORT, "600")]), None);
        assert_eq!(of(&[(ABORT_GRPC, "14"), (ABORT_PERCENTAGE, "1")]), Some(("gRPC 14".to_owned(), 10_000)));
        assert_eq!(of(&[(ABORT_GRPC, "17")]), None);
        assert_eq!(of(&[(ABORT_GRPC, "14"), (ABORT, "500")]), Some(("500".to_owned(), 1_000_000)));
    }
}
