//! What Istio has no field for: extensions of ours, in annotations, off unless they are asked for.
//!
//! | annotation | on | value | what |
//! |---|---|---|---|
//! | `mesh.rs/retry` | VirtualService | `idempotent-only` | what is not idempotent is tried again only when nobody has seen it (VS-Y10) |
//! | `mesh.rs/stream-idle-timeout` | VirtualService | a duration | how long nothing may be received of a response |
//! | `mesh.rs/client-overrides` | VirtualService | `true` | Envoy's headers for timeouts and retries are followed (VS-T02) |
//! | `mesh.rs/fault-scope` | VirtualService | `per-request`, `per-try` | whether `fault` is drawn for each try, so that retries and timeouts apply to it |
//! | `mesh.rs/sticky-split` | VirtualService | `header:NAME`, `cookie:NAME`, `source-ip`, `query:NAME` | who stays on a destination of an HTTP rule while its weights change (VS-R05) |
//! | `mesh.rs/mirror` | VirtualService | a JSON object by mirror (`HOST/SUBSET`, `HOST` or `*`) of `authority`, `set`, `add`, `remove`, `sampleBy` | authority and header operations of mirrored copies, and the key that decides which requests are copied (VS-P04) |
//! | `mesh.rs/mirror-diff` | VirtualService | a JSON object of `percentage`, `headers`, `baseline`, `baselineAnyMethod`, `bodyBytes`, `capture` | the answers of mirrors are compared with those of the primary (VS-P05) |
//! | `mesh.rs/canary` | VirtualService | `canary=SUBSET-OR-HOST; KEY=VALUE; …` | which of two destinations is rolled out by what is measured of it (`canary.rs` has the keys) |
//! | `mesh.rs/load-balancer` | DestinationRule | `PEAK_EWMA` | the algorithm where the policy names none (DR-LB10) |

use std::collections::BTreeMap;

use mesh_core::diagnostics::{Diagnostics, DocId};
use mesh_core::istio::types::common::Duration;

use crate::hash_policy::HashPolicy;

const PREFIX: &str = "mesh.rs/";

pub(super) const RETRY: &str = "mesh.rs/retry";
pub(super) const IDEMPOTENT_ONLY: &str = "idempotent-only";
pub(super) const STREAM_IDLE_TIMEOUT: &str = "mesh.rs/stream-idle-timeout";
pub(super) const CLIENT_OVERRIDES: &str = "mesh.rs/client-overrides";
pub(super) const FAULT_SCOPE: &str = "mesh.rs/fault-scope";
pub(super) const STICKY_SPLIT: &str = "mesh.rs/sticky-split";
pub(super) const MIRROR: &str = "mesh.rs/mirror";
pub(super) const MIRROR_DIFF: &str = "mesh.rs/mirror-diff";
pub(super) const CANARY: &str = "mesh.rs/canary";
pub(super) const LOAD_BALANCER: &str = "mesh.rs/load-balancer";
pub(super) const PEAK_EWMA: &str = "PEAK_EWMA";

type Judge = fn(&str) -> Result<(), String>;

/// The annotations of a kind, each with the judge of its value.
type Known = &'static [(&'static str, Judge)];

pub(super) const VIRTUAL_SERVICE: Known = &[
    (RETRY, |value| one_of(value, &[IDEMPOTENT_ONLY])),
    (STREAM_IDLE_TIMEOUT, |value| duration(value).map(drop)),
    // Judged where faults are compiled.
    (FAULT_SCOPE, |_| Ok(())),
    (CLIENT_OVERRIDES, |value| one_of(value, &["true", "false"])),
    (MIRROR, |value| super::mirror::Extras::parse(value).map(drop)),
    (MIRROR_DIFF, |value| super::mirror::diff_policy(value).map(drop)),
    (STICKY_SPLIT, |value| value.parse::<HashPolicy>().map(drop).map_err(|error| error.to_string())),
    // Judged where rollouts are compiled.
    (CANARY, |_| Ok(())),
];

pub(super) const DESTINATION_RULE: Known = &[(LOAD_BALANCER, |value| one_of(value, &[PEAK_EWMA]))];

/// Reports annotations with our prefix that the kind does not have, and values that are none.
pub(super) fn check(
    annotations: &BTreeMap<String, String>,
    known: Known,
    doc: DocId,
    diags: &mut Diagnostics,
) {
    for (name, value) in annotations.iter().filter(|(name, _)| name.starts_with(PREFIX)) {
        let path = format!("metadata.annotations.{name}");
        match known.iter().find(|(known, _)| known == name) {
            None => diags.warning_at(doc, path, "no annotation of this kind has this name".to_owned()),
            Some((_, judge)) => {
                if let Err(reason) = judge(value) {
                    diags.error_at(doc, path, format!("{value:?}: {reason}"));
                }
            }
        }
    }
}

/// A positive duration.
pub(super) fn duration(value: &str) -> Result<std::time::Duration, String> {
    let duration: Duration =
        value.parse().map_err(|error: mesh_core::istio::types::common::InvalidDuration| error.to_string())?;
    if duration.is_negative() || duration.is_zero() {
        return Err("a time above zero is wanted".to_owned());
    }
    Ok(duration.to_std())
}

fn one_of(value: &str, known: &[&str]) -> Result<(), String> {
    if known.contains(&value) { Ok(()) } else { Err(format!("known are {}", known.join(", "))) }
}
