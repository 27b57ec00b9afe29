//! Authorization of the mesh as tower layers.
//!
//! This version enforces nothing. AuthorizationPolicy, RequestAuthentication and the kinds before them are loaded and
//! validated by mesh-core; because no crate gives meaning to them yet, each is reported as not enforced: an error for
//! `--check`, and a warning at the start and on every look at `/ready`.
#![forbid(unsafe_code)]
