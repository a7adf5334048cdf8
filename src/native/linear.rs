//! Linears with what follows them fused: which kernel serves which sizes, and a checked launch of each.
#![allow(unsafe_code)]

use super::kernels::{DeviceLinear, DeviceNorm, Matrix, NativeKernels, Rows, address, argument, hold, norm_parameters};
use super::shape::{CHUNK, Precision};
use crate::cuda::launch::{Function, Grid, Module, Parameters, c_int};
use crate::cuda::{DeviceBuffer, Result, Stream};
use std::ffi::CStr;
use std::sync::Arc;

/// Tokens that `linear_few` is launched for at most.
pub(super) const FEW: usize = 64;

/// Tokens of the largest pack whose ping-pong tiles join statistics themselves.
const MOST_JOINED: usize = 8192;

/// What a linear reads and writes.
#[derive(Debug, Clone, Copy)]
pub(super) struct LinearJob<'a> {
    pub input: &'a Matrix,
    pub linear: &'a DeviceLinear,
    /// Of the input, where a norm is folded in.
    pub statistics: &'a DeviceBuffer<f32>,
    /// Added: the stream through a norm, or as it is.
    pub residual: Option<(&'a Matrix, Option<&'a DeviceNorm>)>,
    pub activated: bool,
    pub out: &'a Matrix,
    pub tokens: usize,
    /// Sums of the stream's chunks, two f32 a chunk and token, on Hopper: a linear with a residual leaves them, for the next linear or for
    /// [`NativeKernels::join`].
    pub partials: &'a DeviceBuffer<f32>,
    /// Whether the statistics of the input are made of `partials`, and left in `statistics`.
    pub joins: bool,
}

/// What a linear needs besides that measures its input itself, or joins the sums that another left.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measured<'a> {
    pub norm: Option<&'a DeviceNorm>,
    pub rows: Rows<'a>,
    pub stage: usize,
    pub fault: &'a DeviceBuffer<i32>,
}

/// The kernels of one shape.
pub(super) enum Linears {
    /// Without and with the activation.
    Exact([Function; 2]),
    /// Of values of two bytes.
    Tiled {
        /// Without and with the activation.
        few: [Function; 2],
        small: [Function; 2],
        large: [Function; 2],
        hopper: Option<Box<Hopper>>,
    },
}

/// Those of linear_sm90.cu, each plain, with the activation, and with a residual.
pub(super) struct Hopper {
    pingpong: [Function; 3],
    wide: [Function; 3],
    medium: [Function; 3],
    narrow: [Function; 3],
    split: [Function; 3],
    join: Function,
}

/// Which kernel makes a linear, where values are of two bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tile {
    /// `linear_few`, which measures its input itself.
    Few,
    /// `linear_64`.
    Small,
    /// `linear_128`.
    Large,
    /// `linear_sm90_pingpong`.
    Pingpong,
    /// `linear_sm90_192`.
    Wide,
    /// `linear_sm90_128`.
    Medium,
    /// `linear_sm90_64`.
    Narrow,
    /// `linear_sm90_split`, by clusters of so many blocks.
    Split(usize),
}

/// Kernel, blocks, threads, blocks of a cluster and bytes of shared memory.
type Launch<'a> = (&'a Function, [usize; 2], u32, usize, usize);

impl Tile {
    /// Dynamic shared memory in bytes, as the kernels' contracts say.
    fn shared(self) -> usize {
        match self {
            Self::Few => 0,
            Self::Small => 4 * (64 + 64) * 128,
            Self::Large => 3 * (128 + 128) * 128,
            Self::Pingpong => 230_720,
            Self::Wide => 214_272,
            Self::Medium => 197_840,
            Self::Narrow => 230_656,
            Self::Split(_) => 197_760,
        }
    }

    /// The kernel that serves a linear of these sizes, on a GPU of so many multiprocessors.
    pub fn choose(tokens: usize, outputs: usize, inputs: usize, multiprocessors: usize, hopper: bool) -> Self {
        // From 17 tokens on `linear_few` reads the weights more than once, which on Hopper the bulk copies of the others beat.
        if tokens <= if hopper { 16 } else { FEW } {
            return Self::Few;
        }
        let tiles = |rows: usize, columns: usize| tokens.div_ceil(rows) * outputs.div_ceil(columns);
        if !hopper {
            return if tiles(128, 128) >= multiprocessors { Self::Large } else { Self::Small };
        }
        // Measured on an H200 for the linears of MPNet-base. Long sums of few tiles are split over clusters, as far as all blocks run at once; else the
        // narrowest tiles of which each multiprocessor has one at most, for a second round costs as much as the first.
        let narrow = tiles(128, 64);
        let long = inputs >= 1536;
        if long && 4 * narrow <= multiprocessors {
            Self::Split(4)
        } else if long && 2 * narrow <= multiprocessors {
            Self::Split(2)
        } else if narrow <= multiprocessors {
            Self::Narrow
        } else if tiles(128, 128) <= multiprocessors {
            Self::Medium
        } else if tiles(128, 192) <= multiprocessors {
            Self::Wide
        } else {
            Self::Pingpong
        }
    }
}

impl Linears {
    /// `module` compiles a kernel file; `hopper` says whether for such a GPU.
    pub fn load(precision: Precision, hopper: bool, module: impl Fn(&str) -> Result<Arc<Module>>) -> Result<Self> {
        if precision == Precision::Fp32 {
            let module = module("exact.cu")?;
            return Ok(Self::Exact([module.function(c"linear_exact")?, module.function(c"linear_exact_activated")?]));
        }
        let tiled = module("linear.cu")?;
        let pair = |names: [&CStr; 2], tile: Tile| -> Result<[Function; 2]> {
            let [plain, activated] = names.map(|name| tiled.function_with_shared(name, tile.shared()));
            Ok([plain?, activated?])
        };
        Ok(Self::Tiled {
            few: pair([c"linear_few", c"linear_few_activated"], Tile::Few)?,
            small: pair([c"linear_64", c"linear_64_activated"], Tile::Small)?,
            large: pair([c"linear_128", c"linear_128_activated"], Tile::Large)?,
            hopper: if hopper { Some(Box::new(Hopper::load(&module("linear_sm90.cu")?)?)) } else { None },
        })
    }
}

impl Hopper {
    fn load(module: &Arc<Module>) -> Result<Self> {
        let three = |names: [&CStr; 3], tile: Tile| -> Result<[Function; 3]> {
            let [plain, activated, residual] = names.map(|name| module.function_with_shared(name, tile.shared()));
            Ok([plain?, activated?, residual?])
        };
        Ok(Self {
            pingpong: three(
                [c"linear_sm90_pingpong_plain", c"linear_sm90_pingpong_activated", c"linear_sm90_pingpong_residual"],
                Tile::Pingpong,
            )?,
            wide: three([c"linear_sm90_192_plain", c"linear_sm90_192_activated", c"linear_sm90_192_residual"], Tile::Wide)?,
            medium: three([c"linear_sm90_128_plain", c"linear_sm90_128_activated", c"linear_sm90_128_residual"], Tile::Medium)?,
            narrow: three([c"linear_sm90_64_plain", c"linear_sm90_64_activated", c"linear_sm90_64_residual"], Tile::Narrow)?,
            split: three(
                [c"linear_sm90_split_plain", c"linear_sm90_split_activated", c"linear_sm90_split_residual"],
                Tile::Split(1),
            )?,
            join: module.function(c"join_statistics")?,
        })
    }
}

impl NativeKernels {
    /// The kernel that serves a linear of these sizes; of no meaning in fp32.
    pub fn tile(&self, tokens: usize, outputs: usize, inputs: usize) -> Tile {
        let hopper = matches!(&self.0.linears, Linears::Tiled { hopper: Some(_), .. });
        let tile = Tile::choose(tokens, outputs, inputs, self.0.device.properties().multiprocessors as usize, hopper);
        match tile {
            // Their sums have orders of their own; the tiled ones all have the same.
            Tile::Few | Tile::Split(_) if self.0.invariant && hopper => Tile::Narrow,
            Tile::Few if self.0.invariant => Tile::Small,
            tile => tile,
        }
    }

    /// Whether a linear by `tile` makes statistics of the sums that the linear in front left.
    pub fn joins(&self, tile: Tile) -> bool {
        let hopper = matches!(&self.0.linears, Linears::Tiled { hopper: Some(_), .. });
        hopper && !matches!(tile, Tile::Few | Tile::Small | Tile::Large)
    }

    /// Whether that takes less time than [`NativeKernels::join`]: in packs of many tokens the kernel is a small part, and what it does under the products of
    /// ping-pong tiles slows those down.
    pub fn should_join(&self, tile: Tile, tokens: usize) -> bool {
        self.joins(tile) && (tile != Tile::Pingpong || tokens <= MOST_JOINED)
    }

    /// Whether a linear with a residual leaves the sums of which [`NativeKernels::join`] makes statistics.
    pub fn leaves_partials(&self, tokens: usize) -> bool {
        let hidden = self.0.shape.hidden;
        matches!(&self.0.linears, Linears::Tiled { hopper: Some(_), .. }) && self.tile(tokens, hidden, hidden) != Tile::Few
    }

    /// Enqueues a linear by `tile`; `measures` is for [`Tile::Few`], and where it joins.
    ///
    /// # Errors
    /// [`CudaError::Argument`](crate::cuda::CudaError::Argument) for sizes that do not belong together, buffers that are too short or of another device,
    /// and a tile that this GPU has not.
    pub fn linear(&self, stream: &mut Stream, job: &LinearJob<'_>, tile: Tile, measures: &Measured<'_>) -> Result<()> {
        const CALL: &str = "linear";
        let LinearJob { input, linear, statistics, residual, activated, out, tokens, partials, joins } = *job;
        let (inputs, outputs) = (linear.weight.columns, linear.weight.capacity);
        let capacity = input.capacity;
        let norm = residual.and_then(|(_, norm)| norm);
        let residual_matrix = residual.map(|(matrix, _)| matrix);
        let fits = [input, out].into_iter().chain(residual_matrix).all(|matrix| matrix.capacity == capacity)
            && input.columns == inputs
            && out.columns == outputs
            && residual_matrix.is_none_or(|matrix| matrix.columns == outputs)
            && (1..=capacity).contains(&tokens)
            && !(activated && residual.is_some())
            && !(joins && (residual.is_some() || linear.sums.is_none() || !self.joins(tile)))
            && linear.bias.len() >= outputs
            && linear.sums.as_ref().is_none_or(|sums| sums.len() >= outputs)
            && statistics.len() >= 2 * capacity;
        if !fits {
            let reason = format!(
                "{outputs} outputs of {inputs} inputs, {tokens} tokens, in {input:?} to {out:?} with {residual_matrix:?}"
            );
            return Err(argument(CALL, reason));
        }
        for matrix in [input, out, &linear.weight].into_iter().chain(residual_matrix) {
            self.check_matrix(CALL, matrix)?;
            stream.hold_buffer(&matrix.values);
        }
        if let Some(norm) = norm {
            self.check_norm(CALL, norm, outputs)?;
        }
        let (gamma, beta) = (norm.map(|norm| &norm.gamma), norm.and_then(|norm| norm.beta.as_ref()));
        hold(stream, &[Some(&linear.bias), linear.sums.as_ref(), Some(statistics), gamma, beta]);

        let mut parameters = Parameters::new();
        for address in [
            input.values.address(),
            linear.weight.values.address(),
            linear.bias.address(),
            address(linear.sums.as_ref()),
            // Without a norm there are none, whatever the buffer holds.
            linear.sums.as_ref().map_or(0, |_| statistics.address()),
            residual_matrix.map_or(0, |matrix| matrix.values.address()),
            statistics.address(),
            address(gamma),
            address(beta),
            out.values.address(),
        ] {
            parameters.address(address);
        }
        let which = usize::from(activated);
        let grid = |tile: usize| [outputs.div_ceil(tile), tokens.div_ceil(tile)];
        let sizes = match &self.0.linears {
            Linears::Exact(_) => [tokens, outputs, inputs],
            Linears::Tiled { .. } => [capacity, outputs, inputs],
        };
        for n in sizes {
            parameters.int(c_int(CALL, n)?);
        }
        let (function, [x, y], block, cluster, shared): Launch<'_> = match (&self.0.linears, tile) {
            (Linears::Exact(functions), _) => (&functions[which], grid(64), 256, 1, 0),
            (Linears::Tiled { small, .. }, Tile::Small) => (&small[which], grid(64), 128, 1, tile.shared()),
            (Linears::Tiled { large, .. }, Tile::Large) => (&large[which], grid(128), 256, 1, tile.shared()),
            (Linears::Tiled { few, .. }, Tile::Few) if tokens <= FEW => {
                parameters.int(c_int(CALL, tokens)?);
                self.measured_parameters(CALL, stream, &mut parameters, measures)?;
                (&few[which], [outputs / 8, 1], 256, 1, 0)
            }
            (Linears::Tiled { hopper: Some(hopper), .. }, tile) if !matches!(tile, Tile::Few) => {
                let chunks = if residual.is_some() { outputs / CHUNK } else { inputs / CHUNK };
                let partial_sums = chunks * capacity * 2;
                let used = residual.is_some() || joins;
                if used && partials.len() < partial_sums {
                    return Err(argument(CALL, format!("{} partial sums of {partial_sums}", partials.len())));
                }
                hold(stream, &[Some(partials)]);
                parameters.int(c_int(CALL, tokens)?);
                parameters.address(if used { partials.address() } else { 0 });
                self.measured_parameters(CALL, stream, &mut parameters, measures)?;
                let which = if residual.is_some() { 2 } else { which };
                self.hopper_launch(hopper, tile, which, tokens, outputs)
            }
            (Linears::Tiled { .. }, tile) => {
                return Err(argument(CALL, format!("{tile:?} for {tokens} tokens is not for this GPU")));
            }
        };
        let size = |n: usize| c_int(CALL, n).map(i32::cast_unsigned);
        let grid =
            Grid { x: size(x)?, y: size(y)?, block, cluster: size(cluster)?, shared: size(shared)?, dependent: self.0.dependent };
        // SAFETY: the parameters of linear.cu, linear_sm90.cu or exact.cu, in order; all sizes were checked above, and grid, cluster and shared
        // memory are what the kernel's contract asks for. Tiles end within the capacity, which is a multiple of them; outputs beyond the last are not written.
        unsafe { self.launch(stream, function, CALL, grid, parameters) }
    }

    fn measured_parameters(
        &self,
        call: &'static str,
        stream: &mut Stream,
        parameters: &mut Parameters,
        &Measured { norm, rows, stage, fault }: &Measured<'_>,
    ) -> Result<()> {
        self.check_rows(call, &rows)?;
        hold(stream, &[Some(rows.starts), Some(rows.lengths), Some(fault)]);
        norm_parameters(parameters, norm);
        parameters.address(rows.starts.address());
        parameters.address(rows.lengths.address());
        parameters.int(c_int(call, rows.rows)?);
        parameters.int(c_int(call, stage)?);
        parameters.address(fault.address());
        Ok(())
    }

    fn hopper_launch<'a>(&self, hopper: &'a Hopper, tile: Tile, which: usize, tokens: usize, outputs: usize) -> Launch<'a> {
        let multiprocessors = self.0.device.properties().multiprocessors as usize;
        let rows = tokens.div_ceil(128);
        let (functions, blocks, cluster) = match tile {
            Tile::Wide => (&hopper.wide, multiprocessors.min(rows * outputs.div_ceil(192)), 1),
            Tile::Medium => (&hopper.medium, multiprocessors.min(rows * outputs.div_ceil(128)), 1),
            Tile::Narrow => (&hopper.narrow, multiprocessors.min(rows * (outputs / 64)), 1),
            Tile::Split(blocks) => (&hopper.split, blocks * rows * (outputs / 64), blocks),
            Tile::Few | Tile::Small | Tile::Large | Tile::Pingpong => {
                let pairs = tokens.div_ceil(256) * outputs.div_ceil(192);
                (&hopper.pingpong, 2 * pairs.min(multiprocessors / 2), 2)
            }
        };
        (&functions[which], [blocks, 1], 384, cluster, tile.shared())
    }

    /// Enqueues making statistics of the sums that a linear with a residual left in `partials`.
    ///
    /// # Errors
    /// As [`NativeKernels::linear`].
    pub fn join(
        &self,
        stream: &mut Stream,
        partials: &DeviceBuffer<f32>,
        (matrix, statistics): (&Matrix, &DeviceBuffer<f32>),
        rows: &Rows<'_>,
        norm: &DeviceNorm,
        fault: (usize, &DeviceBuffer<i32>),
    ) -> Result<()> {
        const CALL: &str = "join statistics";
        let Linears::Tiled { hopper: Some(hopper), .. } = &self.0.linears else {
            return Err(argument(CALL, "no linear left sums for it".to_owned()));
        };
        if partials.len() < matrix.columns / CHUNK * matrix.capacity * 2 {
            return Err(argument(CALL, format!("{} partial sums for {matrix:?}", partials.len())));
        }
        stream.hold_buffer(partials);
        let x = c_int(CALL, rows.tokens.div_ceil(128))?.cast_unsigned();
        let grid = Grid { x, y: 1, block: 128, cluster: 1, shared: 0, dependent: self.0.dependent };
        let how = (&hopper.join, CALL, grid, partials.address());
        // SAFETY: linear_sm90.cu's join_statistics; the partial sums are of the matrix' size (checked above).
        unsafe { self.make_statistics(stream, how, (matrix, statistics), rows, norm, fault) }
    }
}

#[cfg(test)]
mod choice_tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn tiles_fill_the_gpu() {
        let on_h100 = |tokens, outputs, inputs| Tile::choose(tokens, outputs, inputs, 132, true);
        assert_eq!(on_h100(16_384, 2304, 768), Tile::Pingpong);
        assert_eq!([on_h100(16, 2304, 768), on_h100(17, 768, 3072)], [Tile::Few, Tile::Split(4)]);
        assert_eq!(on_h100(128, 768, 3072), Tile::Split(4));
        assert_eq!([on_h100(128, 3072, 768), on_h100(512, 2304, 768)], [Tile::Narrow, Tile::Medium]);
        assert_eq!([on_h100(512, 768, 3072), on_h100(512, 768, 768)], [Tile::Split(2), Tile::Narrow]);
        assert_eq!([on_h100(1024, 3072, 768), on_h100(4096, 768, 3072)], [Tile::Wide, Tile::Wide]);
        let on_a100 = |tokens, outputs| Tile::choose(tokens, outputs, 768, 108, false);
        assert_eq!([on_a100(16, 768), on_a100(128, 768), on_a100(16_384, 768)], [Tile::Few, Tile::Small, Tile::Large]);
    }

    proptest! {
        #[test]
        fn no_tile_needs_what_is_not_there(tokens in 1usize..20_000, chunks in 1usize..60, inputs in 1usize..60, hopper: bool) {
            let tile = Tile::choose(tokens, chunks * 64, inputs * 64, 132, hopper);
            match tile {
                Tile::Few => prop_assert!(tokens <= FEW),
                Tile::Small | Tile::Large => prop_assert!(!hopper),
                Tile::Split(blocks) => prop_assert!(hopper && tokens.div_ceil(128) * chunks * blocks <= 132 && inputs * 64 >= 1536),
                Tile::Pingpong
                | Tile::Wide
                | Tile::Medium
                | Tile::Narrow => prop_assert!(hopper),
            }
        }
    }
}

#[cfg(test)]
#[path = "linear_tests.rs"]
mod tests;
