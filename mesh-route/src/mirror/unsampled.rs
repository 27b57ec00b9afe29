//! What the headers of a copy say of traces: that it is sampled by none (VS-P02).
//!
//! The ids stay, so that logs of both sides can be laid side by side; only the decision is taken back, as a proxy that
//! traces writes it for what it does not sample.

use http::{HeaderMap, HeaderName, HeaderValue};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");
const NOT: HeaderValue = HeaderValue::from_static("0");

/// Takes the decision to sample out of the headers of W3C and B3, where they are.
pub(super) fn unsample(headers: &mut HeaderMap) {
    if let Some(value) = headers.get_mut(TRACEPARENT)
        && let Some(unsampled) = w3c(value)
    {
        *value = unsampled;
    }
    if let Some(value) = headers.get_mut(B3)
        && let Some(unsampled) = b3(value)
    {
        *value = unsampled;
    }
    // A flag of 1 asks for debugging, which samples whatever the other says.
    let debug = headers.remove(B3_FLAGS).is_some();
    if debug || headers.contains_key(B3_SAMPLED) {
        headers.insert(B3_SAMPLED, NOT);
    }
}

/// `version-trace-parent-flags`, of whose flags the lowest bit samples.
fn w3c(value: &HeaderValue) -> Option<HeaderValue> {
    let text = value.to_str().ok()?;
    let (ids, flags) = text.get(..52).zip(text.get(53..55))?;
    let flags = u8::from_str_radix(flags, 16).ok()? & !1;
    HeaderValue::try_from(format!("{ids}-{flags:02x}{}", &text[55..])).ok()
}

/// `trace-span-sampled-parent`, or the decision alone.
fn b3(value: &HeaderValue) -> Option<HeaderValue> {
    let text = value.to_str().ok()?;
    let mut parts: Vec<_> = text.split('-').collect();
    let decision = if parts.len() == 1 { parts.first_mut() } else { parts.get_mut(2) }?;
    *decision = "0";
    HeaderValue::try_from(parts.join("-")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vs_p02_a_copy_is_sampled_by_no_trace() {
        let (trace, span) = ("80f198ee56343ba864fe8b2a57d3eff7", "e457b5a2e4d86bd1");
        for (name, sampled, unsampled) in [
            ("traceparent", format!("00-{trace}-{span}-01"), format!("00-{trace}-{span}-00")),
            ("traceparent", format!("00-{trace}-{span}-03"), format!("00-{trace}-{span}-02")),
            ("traceparent", "nonsense".to_owned(), "nonsense".to_owned()),
            ("b3", format!("{trace}-{span}-1"), format!("{trace}-{span}-0")),
            ("b3", format!("{trace}-{span}-d-{span}"), format!("{trace}-{span}-0-{span}")),
            ("b3", format!("{trace}-{span}"), format!("{trace}-{span}")),
            ("b3", "1".to_owned(), "0".to_owned()),
            ("x-b3-sampled", "1".to_owned(), "0".to_owned()),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(name, sampled.parse().unwrap());
            unsample(&mut headers);
            assert_eq!(headers[name], unsampled, "{sampled}");
            assert_eq!(headers.len(), 1);
        }
        let mut headers = HeaderMap::from_iter([(B3_FLAGS, HeaderValue::from_static("1"))]);
        unsample(&mut headers);
        assert_eq!(headers, HeaderMap::from_iter([(B3_SAMPLED, NOT)]));
        let mut headers = HeaderMap::new();
        unsample(&mut headers);
        assert!(headers.is_empty());
    }
}
