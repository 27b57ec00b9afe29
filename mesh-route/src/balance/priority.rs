//! Priorities (DR-LB06) and panic (DR-OD04): how the load is shared when endpoints are out.
//!
//! Envoy's rules. A priority is as available as 1.4 times the share of its endpoints that are in, at most wholly; what
//! the first cannot take goes to the next. When all together cannot take everything, a priority of which a smaller share
//! is in than the panic threshold is in panic: all its endpoints are used. When all are in panic, each takes a load by
//! the number of its endpoints.

/// Envoy's overprovisioning factor, in percent.
const OVERPROVISIONING: usize = 140;

/// What a priority takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// In percent of all requests.
    pub percent: u32,
    /// Whether all its endpoints are used, ejected ones too.
    pub panic: bool,
}

/// What each priority takes, of `(available, all)` endpoints each. `threshold` is the panic threshold in percent; 0 is no
/// panic: then nobody is picked when nobody is available.
#[must_use]
pub fn loads(priorities: &[(usize, usize)], threshold: u32) -> Vec<Load> {
    let availability: Vec<u32> = priorities.iter().map(|(in_, all)| available(*in_, *all)).collect();
    let total = availability.iter().sum::<u32>().min(100);
    let mut loads = vec![Load::default(); priorities.len()];
    let mut left = 100;
    for (load, available) in loads.iter_mut().zip(&availability) {
        load.percent = (available * 100).checked_div(total).unwrap_or(0).min(left);
        left -= load.percent;
    }
    // What rounding left over.
    if left < 100
        && let Some(first) = loads.iter_mut().find(|load| load.percent > 0)
    {
        first.percent += left;
    }
    if total < 100 && threshold > 0 {
        for (load, (in_, all)) in loads.iter_mut().zip(priorities) {
            load.panic = in_ * 100 < all * threshold.min(100) as usize;
        }
        let endpoints: usize = priorities.iter().map(|(_, all)| all).sum();
        if endpoints > 0 && loads.iter().zip(priorities).all(|(load, (_, all))| load.panic || *all == 0) {
            let mut left = 100;
            for (load, (_, all)) in loads.iter_mut().zip(priorities) {
                load.percent = (all * 100 / endpoints) as u32;
                left -= load.percent;
            }
            if let Some(first) = loads.iter_mut().find(|load| load.percent > 0) {
                first.percent += left;
            }
        }
    }
    loads
}

/// How much of its load a part can take, in percent; not nothing while somebody is in.
pub(super) fn available(available: usize, all: usize) -> u32 {
    let least = usize::from(available > 0);
    (OVERPROVISIONING * available).checked_div(all).map_or(0, |percent| percent.clamp(least, 100) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn percents(priorities: &[(usize, usize)]) -> Vec<u32> {
        loads(priorities, 0).iter().map(|load| load.percent).collect()
    }

    #[test]
    fn dr_lb06_the_load_spills_over_as_envoy_documents() {
        // The tables of Envoy's documentation on priorities, with 100 endpoints each.
        for (first, load) in [(100, [100, 0]), (72, [100, 0]), (71, [99, 1]), (50, [70, 30]), (25, [35, 65])]
        {
            assert_eq!(percents(&[(first, 100), (100, 100)]), load, "{first}");
        }
        assert_eq!(percents(&[(0, 100), (100, 100)]), [0, 100]);
        assert_eq!(percents(&[(25, 100), (25, 100)]), [50, 50]);
        assert_eq!(
            percents(&[(5, 100), (0, 100), (65, 100)]),
            [8, 0, 92],
            "7 and 91 of 98; the rest is the first's"
        );
        assert_eq!(percents(&[(0, 2), (0, 2)]), [0, 0]);
        assert_eq!(percents(&[(1, 1000)]), [100], "one in a thousand takes what there is");
        assert_eq!(percents(&[]), [0_u32; 0]);
    }

    #[test]
    fn dr_od04_panic_is_below_the_threshold_and_only_when_not_everything_can_be_taken() {
        let panics = |priorities: &[_], threshold| {
            loads(priorities, threshold).iter().map(|load| (load.percent, load.panic)).collect::<Vec<_>>()
        };
        assert_eq!(panics(&[(2, 5)], 50), [(100, true)]);
        assert_eq!(panics(&[(3, 5)], 50), [(100, false)]);
        assert_eq!(panics(&[(4, 5)], 90), [(100, false)], "1.4 times four fifths take everything");
        assert_eq!(panics(&[(0, 5)], 0), [(0, false)]);
        assert_eq!(panics(&[(0, 1), (1, 1)], 50), [(0, false), (100, false)]);
        assert_eq!(panics(&[(0, 3), (0, 1)], 50), [(75, true), (25, true)], "by the number of endpoints");
    }
}
