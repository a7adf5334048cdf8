//! Histograms of magnitudes, in one pass and bounded memory, and the ranges read off them.

use super::Method;

/// Bins of a histogram. The largest magnitude lies in the upper half, so that at least half of them are in use.
const BINS: usize = 4096;
/// Most bins that the entropy method looks at, as TensorRT and pytorch-quantization have it.
const ENTROPY_BINS: usize = 2048;
/// Magnitudes that INT8 tells apart.
const LEVELS: usize = 128;

/// Counts of |x| in bins whose width is a power of two. The width doubles when a value lies beyond the last bin, and neighbours are
/// added up, so that the result does not depend on the order of the values nor on how they were split.
#[derive(Debug, Clone)]
pub(super) struct Histogram {
    /// Width of a bin; 0 before the first value above 0.
    width: f32,
    counts: Vec<u64>,
    total: u64,
    amax: f32,
    /// The first value that is NaN or infinite.
    not_finite: Option<f32>,
}

impl Histogram {
    pub fn new() -> Self {
        Self { width: 0.0, counts: vec![0; BINS], total: 0, amax: 0.0, not_finite: None }
    }

    /// Counts `values`.
    pub fn add(&mut self, values: &[f32]) {
        // NaN passes through no comparison: it is looked for by its own.
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            self.not_finite.get_or_insert(*value);
            return;
        }
        self.widen(values.iter().fold(0f32, |amax, value| amax.max(value.abs())));
        let per_unit = if self.width > 0.0 { 1.0 / f64::from(self.width) } else { 0.0 };
        for value in values {
            let bin = (f64::from(value.abs()) * per_unit) as usize;
            self.counts[bin.min(BINS - 1)] += 1;
        }
        self.total += values.len() as u64;
    }

    /// Adds what another histogram has counted.
    pub fn merge(mut self, mut other: Self) -> Self {
        self.not_finite = self.not_finite.or(other.not_finite);
        self.widen(other.amax);
        other.widen(self.amax);
        self.counts.iter_mut().zip(&other.counts).for_each(|(count, more)| *count += more);
        self.total += other.total;
        self
    }

    /// Makes room for magnitudes up to `amax`.
    fn widen(&mut self, amax: f32) {
        self.amax = self.amax.max(amax);
        if self.amax == 0.0 {
            return;
        }
        // The smallest power of two with which amax still lies in the last bin or before. Subnormal magnitudes share the first bin.
        let exponent = (f64::from(self.amax) / BINS as f64).log2().floor() as i32 + 1;
        let width = 2f32.powi(exponent.max(f32::MIN_EXP));
        if self.width == 0.0 {
            // All before were 0 and are in the first bin of any width.
            self.width = width;
        }
        while self.width < width {
            for bin in 0..BINS / 2 {
                self.counts[bin] = self.counts[2 * bin] + self.counts[2 * bin + 1];
            }
            self.counts[BINS / 2..].fill(0);
            self.width *= 2.0;
        }
    }

    /// The first value that was NaN or infinite.
    pub fn not_finite(&self) -> Option<f32> {
        self.not_finite
    }

    /// The range that `method` finds, 0 where all values are.
    pub fn range(&self, method: Method) -> f32 {
        match method {
            Method::MinMax => self.amax,
            Method::Percentile(percentile) => self.percentile(percentile),
            Method::Entropy => self.entropy(),
        }
    }

    /// The upper edge of the bin in which the `percentile` of the values lies.
    fn percentile(&self, percentile: f64) -> f32 {
        let wanted = (percentile / 100.0 * self.total as f64).ceil() as u64;
        let mut seen = 0;
        let bin = self.counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        self.edge(bin.map_or(BINS, |bin| bin + 1), 1)
    }

    /// The upper edge of `bins` bins, each as wide as `each` of the histogram's; at most the largest magnitude.
    fn edge(&self, bins: usize, each: usize) -> f32 {
        (self.width * (bins * each) as f32).min(self.amax)
    }

    /// The cut with the smallest Kullback-Leibler divergence from the cut distribution to its INT8 form.
    fn entropy(&self) -> f32 {
        let used = self.counts.iter().rposition(|&count| count > 0).map_or(0, |last| last + 1);
        let each = used.div_ceil(ENTROPY_BINS).max(1);
        let mut bins: Vec<f64> = self.counts[..used].chunks(each).map(|bins| bins.iter().sum::<u64>() as f64).collect();
        // Zeros (padding of activations, ReLU) say nothing of the range: the first bin is made like its neighbour.
        if let [first, second, ..] = bins.as_mut_slice() {
            *first = first.min(*second);
        }
        let divergences = (LEVELS..=bins.len()).map(|cut| (cut, divergence(&bins, cut)));
        let best = divergences.min_by(|a, b| a.1.total_cmp(&b.1)).map_or(bins.len(), |(cut, _)| cut);
        self.edge(best, each)
    }
}

/// What a last bin that holds outliers alone is taken for, as in MXNet's smoothing: without it such a cut would be infinitely far, and
/// outliers beyond a gap would never be cut.
const EMPTY_SHARE: f64 = 1e-4;

/// Of `bins` cut at `cut` (what lies beyond counts as the last bin) from the same in [`LEVELS`] levels.
fn divergence(bins: &[f64], cut: usize) -> f64 {
    let outliers: f64 = bins[cut..].iter().sum();
    let inside: f64 = bins[..cut].iter().sum();
    let total = inside + outliers;
    if inside == 0.0 {
        return f64::INFINITY;
    }
    let mut divergence = 0.0;
    for level in 0..LEVELS {
        let range = level * cut / LEVELS..(level + 1) * cut / LEVELS;
        let filled = bins[range.clone()].iter().filter(|&&count| count > 0.0).count();
        // A level gives each of its bins that are not empty the same share.
        let share = bins[range.clone()].iter().sum::<f64>() / filled.max(1) as f64 / inside;
        for bin in range {
            let reference = (bins[bin] + if bin + 1 == cut { outliers } else { 0.0 }) / total;
            if reference > 0.0 {
                let share = if bins[bin] > 0.0 { share } else { EMPTY_SHARE };
                divergence += reference * (reference / share).ln();
            }
        }
    }
    divergence
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(values: &[f32]) -> Histogram {
        let mut histogram = Histogram::new();
        histogram.add(values);
        histogram
    }

    proptest! {
        #[test]
        fn order_and_split_change_nothing_and_percentiles_are_those_of_the_sorted_values(
            values in prop::collection::vec(prop_oneof![-1e-3f32..1e-3, -1f32..1.0, -1e4f32..1e4, Just(0.0)], 1..300),
            cut in any::<prop::sample::Index>(),
            percentile in 1f64..100.0,
        ) {
            let whole = of(&values);
            let cut = cut.index(values.len());
            let mut reversed = values.clone();
            reversed.reverse();
            for other in [of(&values[..cut]).merge(of(&values[cut..])), of(&values[cut..]).merge(of(&values[..cut])), of(&reversed)] {
                prop_assert_eq!((other.width, other.amax, other.total), (whole.width, whole.amax, whole.total));
                prop_assert_eq!(&other.counts, &whole.counts);
            }
            prop_assert_eq!(whole.counts.iter().sum::<u64>(), values.len() as u64);
            let mut sorted: Vec<f32> = values.iter().map(|value| value.abs()).collect();
            sorted.sort_by(f32::total_cmp);
            prop_assert_eq!(whole.range(Method::MinMax), sorted[sorted.len() - 1]);
            let exact = sorted[(percentile / 100.0 * sorted.len() as f64).ceil() as usize - 1];
            let found = whole.range(Method::Percentile(percentile));
            prop_assert!(found >= exact && found <= exact + whole.width, "{} {} {}", found, exact, whole.width);
            // At least half the bins are in use.
            prop_assert!(whole.amax == 0.0 || whole.width <= whole.amax * 2.0 / BINS as f32 * 1.0001);
        }
    }

    #[test]
    fn entropy_keeps_an_even_spread() {
        let even: Vec<f32> = (0..200_000).map(|i| i as f32 / 200_000.0).collect();
        let range = of(&even).range(Method::Entropy);
        assert!(range > 0.95, "{range}");
    }

    #[test]
    fn entropy_cuts_few_outliers_beyond_a_gap() {
        // A triangle on 0 to 1, and one value in 40,000 far beyond it.
        let mut values: Vec<f32> = (0..200_000).map(|i| 1.0 - (i as f32 / 200_000.0).sqrt()).collect();
        values.extend([5.0; 5]);
        let range = of(&values).range(Method::Entropy);
        assert!((0.5..2.0).contains(&range), "{range}");
        assert_eq!(of(&values).range(Method::MinMax), 5.0);
    }

    #[test]
    fn what_is_not_finite_is_told() {
        assert!(of(&[1.0, f32::NAN]).not_finite().unwrap().is_nan());
        assert_eq!(of(&[0.0]).merge(of(&[f32::NEG_INFINITY])).not_finite(), Some(f32::NEG_INFINITY));
        assert_eq!(of(&[0.0]).range(Method::Entropy), 0.0);
    }
}
