//! How the pooling kernel is launched: block, groups and cluster, chosen from the shapes alone.

use crate::cuda::Properties;

/// Most threads of a block (CUDA C++ Programming Guide, compute capabilities).
const MAX_THREADS: usize = 1024;
/// Threads of a block where many blocks are at work: with the kernel's 64 registers two of them share a multiprocessor, so one
/// loads while the other adds up.
const THREADS: usize = 512;
/// Largest cluster that every device with clusters runs.
const MAX_CLUSTER: usize = 8;
/// Most groups: the last step adds them up one after the other.
const MAX_GROUPS: usize = 32;

/// What the choice needs to know of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hardware {
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Whether thread block clusters can be launched.
    pub clusters: bool,
}

/// A launch of the pooling kernel; `kernels/pooling.cu` says what each number does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolPlan {
    /// 16-byte pieces of a token that a block reads.
    pub lanes: usize,
    /// Threads that share out the tokens of one lane.
    pub groups: usize,
    /// Blocks that share out the columns.
    pub tiles: usize,
    /// Blocks that share out the tokens of a row.
    pub cluster: usize,
    /// Clusters at work on the rows.
    pub clusters: usize,
}

impl Hardware {
    /// Of a device with these properties.
    pub fn of(properties: &Properties) -> Self {
        Self { multiprocessors: properties.multiprocessors, clusters: properties.clusters }
    }
}

impl PoolPlan {
    /// The plan for `batch` rows of up to `tokens` tokens that count, of which `columns` columns are pooled, `lane` columns in
    /// 16 bytes (8 for fp16, 4 for fp32).
    ///
    /// A row in one block, so that normalisation is part of the same launch, where its lanes fit; the rest of the block's
    /// threads as groups; and, as long as blocks do not fill the device once and every group keeps tokens to read, a cluster
    /// over the tokens.
    pub fn choose(hardware: Hardware, batch: usize, tokens: usize, columns: usize, lane: usize) -> Self {
        let all_lanes = columns.div_ceil(lane).max(1);
        let lanes = if all_lanes <= MAX_THREADS { all_lanes } else { THREADS };
        let tiles = all_lanes.div_ceil(lanes);
        let multiprocessors = (hardware.multiprocessors as usize).max(1);
        // Alone on its multiprocessor, and not part of a cluster, a block may use all threads.
        let alone = !hardware.clusters && batch.saturating_mul(tiles) <= multiprocessors;
        let threads = if alone { MAX_THREADS } else { THREADS };
        let groups = (threads / lanes).clamp(1, MAX_GROUPS).min(tokens.max(1));
        let mut cluster = 1;
        while hardware.clusters
            && cluster < MAX_CLUSTER
            && batch.saturating_mul(tiles * cluster * 2) <= 2 * multiprocessors
            && tokens >= 2 * groups * cluster * 2
        {
            cluster *= 2;
        }
        Self { lanes, groups, tiles, cluster, clusters: batch.clamp(1, Self::MOST_CLUSTERS) }
    }

    /// The plan of [`PoolPlan::choose`] for batches that fill the device, whatever the batch is: a row's sums then have one order in all of them.
    pub fn in_one_order(hardware: Hardware, batch: usize, columns: usize, lane: usize) -> Self {
        let full = Self::choose(hardware, usize::MAX, usize::MAX, columns, lane);
        Self { clusters: batch.clamp(1, Self::MOST_CLUSTERS), ..full }
    }

    /// Keeps `clusters * cluster` within a grid's first dimension.
    const MOST_CLUSTERS: usize = (i32::MAX as usize) / MAX_CLUSTER;

    /// Threads of a block: a whole number of warps.
    pub fn threads(&self) -> usize {
        (self.lanes * self.groups).next_multiple_of(32)
    }

    /// Dynamic shared memory of a block.
    pub fn shared_bytes(&self, lane: usize) -> usize {
        self.groups * self.lanes * lane * size_of::<f32>()
    }

    /// Why the kernel cannot be launched so on `hardware`, for `columns` columns of `lane` to 16 bytes.
    pub(super) fn fault(&self, hardware: Hardware, columns: usize, lane: usize) -> Option<String> {
        let Self { lanes, groups, tiles, cluster, clusters } = *self;
        let positive = lanes > 0 && groups > 0 && tiles > 0 && cluster > 0 && clusters > 0;
        let threads = lanes.checked_mul(groups).is_some_and(|n| n <= MAX_THREADS);
        let covers = tiles.checked_mul(lanes).and_then(|n| n.checked_mul(lane)).is_some_and(|n| n >= columns);
        let grid = clusters <= Self::MOST_CLUSTERS && tiles <= 65_535;
        let size = cluster <= MAX_CLUSTER && cluster.is_power_of_two() && (cluster == 1 || hardware.clusters);
        (!(positive && threads && covers && grid && size))
            .then(|| format!("{self:?} does not fit {columns} columns on {hardware:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const H200: Hardware = Hardware { multiprocessors: 132, clusters: true };
    const A100: Hardware = Hardware { multiprocessors: 108, clusters: false };

    #[test]
    fn mpnet_on_an_h200() {
        let plan = |batch, tokens| PoolPlan::choose(H200, batch, tokens, 768, 8);
        // One long row: a whole cluster, 96 lanes of 16 bytes, 5 groups of tokens.
        assert_eq!(plan(1, 128), PoolPlan { lanes: 96, groups: 5, tiles: 1, cluster: 8, clusters: 1 });
        assert_eq!(plan(1, 128).threads(), 480);
        // Few tokens: no group would have work in a larger cluster.
        assert_eq!(plan(1, 16).cluster, 1);
        // Two blocks a multiprocessor, filled once.
        assert_eq!(plan(128, 512).cluster, 2);
        assert_eq!(plan(512, 512).cluster, 1);
    }

    #[test]
    fn without_clusters_a_lone_block_takes_all_threads() {
        let plan = PoolPlan::choose(A100, 1, 512, 768, 8);
        assert_eq!((plan.groups, plan.cluster, plan.threads()), (10, 1, 960));
        assert_eq!(PoolPlan::choose(A100, 500, 512, 768, 8).groups, 5);
    }

    #[test]
    fn one_token_needs_one_group() {
        let plan = PoolPlan::choose(H200, 64, 1, 768, 8);
        assert_eq!((plan.groups, plan.cluster, plan.threads()), (1, 1, 96));
    }

    #[test]
    fn very_wide_rows_are_tiled() {
        let plan = PoolPlan::choose(H200, 3, 64, 16_384, 8);
        assert_eq!((plan.lanes, plan.tiles), (512, 4));
    }

    proptest! {
        #[test]
        fn every_choice_can_be_launched(
            batch in 1_usize..5000, tokens in 0_usize..5000, columns in 1_usize..40_000, half: bool, clusters: bool,
            multiprocessors in 0_u32..200,
        ) {
            let hardware = Hardware { multiprocessors, clusters };
            let lane = if half { 8 } else { 4 };
            let plan = PoolPlan::choose(hardware, batch, tokens, columns, lane);
            prop_assert_eq!(plan.fault(hardware, columns, lane), None);
            prop_assert!(plan.threads() <= MAX_THREADS && plan.threads().is_multiple_of(32) && plan.threads() >= plan.lanes * plan.groups);
            // What every launch gets without asking for more.
            prop_assert!(plan.shared_bytes(lane) <= 48 * 1024);
            // No tile without columns, and a row in one block whenever its lanes fit one.
            prop_assert!((plan.tiles - 1) * plan.lanes * lane < columns);
            prop_assert_eq!(plan.tiles == 1, columns.div_ceil(lane) <= MAX_THREADS);
        }
    }
}
