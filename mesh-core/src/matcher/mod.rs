//! Matchers: compiled once when configuration is loaded, without allocation when they match.
//!
//! Every matcher prints itself as configuration would say it, so that `explain` names predicates in the user's words.

mod cidr;
mod header;
mod host;
mod query;
pub(crate) mod re2;
mod string;

pub use cidr::{CidrSet, InvalidCidr};
pub use header::HeaderMatcher;
pub(crate) use header::joined;
pub use host::{DuplicateHost, HostMap};
pub use query::QueryMatcher;
pub(crate) use query::first as first_value;
pub use string::{InvalidPattern, StringMatcher, compile_re2};
