//! Who sees a resource: `exportTo`.

/// Whether a client of `client_namespace` sees a resource of `namespace` with this `exportTo`. An empty list takes
/// `default`, the mesh's own list for the kind, which when empty too is everyone.
#[must_use]
pub fn is_visible(export_to: &[String], default: &[String], namespace: &str, client_namespace: &str) -> bool {
    let list = if export_to.is_empty() { default } else { export_to };
    list.is_empty()
        || list.iter().any(|entry| match entry.as_str() {
            "*" => true,
            "." => namespace == client_namespace,
            "~" => false,
            name => name == client_namespace,
        })
}

/// Whether nobody outside of `namespace` sees the resource.
#[must_use]
pub fn is_private(export_to: &[String], default: &[String], namespace: &str) -> bool {
    let list = if export_to.is_empty() { default } else { export_to };
    !list.is_empty() && list.iter().all(|entry| matches!(entry.as_str(), "." | "~") || entry == namespace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn x_04_who_sees_what() {
        let sees = |export_to: &[&str], default: &[&str], client: &str| {
            let own = |list: &[&str]| list.iter().map(|entry| (*entry).to_owned()).collect::<Vec<_>>();
            is_visible(&own(export_to), &own(default), "a", client)
        };
        assert!(sees(&[], &[], "b"));
        assert!(sees(&["*"], &["."], "b"));
        assert!(sees(&["."], &[], "a") && !sees(&["."], &[], "b"));
        assert!(sees(&["b", "c"], &[], "c") && !sees(&["b", "c"], &[], "a"));
        assert!(!sees(&["~"], &[], "a"));
        assert!(sees(&[], &["."], "a") && !sees(&[], &["."], "b"));
    }

    #[test]
    fn x_04_private_is_the_own_namespace_alone() {
        let private = |list: &[&str]| {
            let list: Vec<_> = list.iter().map(|entry| (*entry).to_owned()).collect();
            is_private(&list, &[], "a")
        };
        assert!(private(&["."]) && private(&["a"]) && private(&["~"]));
        assert!(!private(&[]) && !private(&["*"]) && !private(&[".", "b"]));
    }
}
