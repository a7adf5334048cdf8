//! What an engine multiplies in, read off the names of its kernels: the proof that the arithmetic asked for is the one that runs.

use super::profile::Profile;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Matrix products (also those within fused attention) of one profile, by the type of what they multiply.
///
/// NVIDIA's libraries name their kernels by the types they take, e.g. `sm90_xmma_gemm_i8f32_i8i32_f32_…`: int8 in, fp32 out, sums in int32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Products {
    /// The profile.
    pub profile: Profile,
    /// Of 8-bit integers.
    pub int8: usize,
    /// Of 16-bit floats.
    pub fp16: usize,
    /// Of 32-bit floats.
    pub fp32: usize,
    /// Of other types, or kernels whose names do not tell.
    pub other: usize,
}

impl Products {
    /// Counts them among the names of a profile's kernels.
    pub fn count<T: AsRef<str>>(profile: Profile, kernels: &[T]) -> Self {
        let mut products = Self { profile, int8: 0, fp16: 0, fp32: 0, other: 0 };
        for name in kernels {
            match product(&name.as_ref().to_lowercase()) {
                Some(Some(Operand::Int8)) => products.int8 += 1,
                Some(Some(Operand::Fp16)) => products.fp16 += 1,
                Some(Some(Operand::Fp32)) => products.fp32 += 1,
                Some(None) => products.other += 1,
                None => {}
            }
        }
        products
    }

    /// All of them.
    pub fn all(&self) -> usize {
        self.int8 + self.fp16 + self.fp32 + self.other
    }
}

/// `1x16: 8 int8, 4 fp32`.
impl fmt::Display for Products {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { profile, int8, fp16, fp32, other } = *self;
        let counts = [(int8, "int8"), (fp16, "fp16"), (fp32, "fp32"), (other, "of other or unknown types")];
        let said: Vec<String> =
            counts.iter().filter(|(count, _)| *count > 0).map(|(count, name)| format!("{count} {name}")).collect();
        write!(f, "{profile}: {}", if said.is_empty() { "none".into() } else { said.join(", ") })
    }
}

#[derive(Clone, Copy)]
enum Operand {
    Int8,
    Fp16,
    Fp32,
}

/// The operand of the matrix product that the kernel `name` (lower case) computes, if its name tells; `None` for other kernels.
fn product(name: &str) -> Option<Option<Operand>> {
    // The second kernel of a product whose sums are cut in parts only adds these up.
    let is_product = ["gemm", "xmma", "mha"].iter().any(|word| name.contains(word)) && !name.contains("execute_split_k");
    is_product.then(|| operand(name))
}

fn operand(name: &str) -> Option<Operand> {
    // NVIDIA's words for what is multiplied, alone or followed by the type of the result.
    const TYPES: [(&str, Option<Operand>); 11] = [
        ("i8", Some(Operand::Int8)),
        ("s8", Some(Operand::Int8)),
        ("int8", Some(Operand::Int8)),
        ("f16", Some(Operand::Fp16)),
        ("fp16", Some(Operand::Fp16)),
        ("f32", Some(Operand::Fp32)),
        ("fp32", Some(Operand::Fp32)),
        ("bf16", None),
        ("tf32", None),
        ("e4m3", None),
        ("e5m2", None),
    ];
    // cuBLAS names the instruction before `gemm` instead.
    const INSTRUCTIONS: [(&str, Operand); 5] = [
        ("i16832gemm", Operand::Int8),
        ("i8816gemm", Operand::Int8),
        ("h16816gemm", Operand::Fp16),
        ("h1688gemm", Operand::Fp16),
        ("sgemm", Operand::Fp32),
    ];
    // TF32's operands are stored as fp32: only a later word, what is multiplied in, tells them apart.
    if name.split('_').any(|word| word.starts_with("tf32")) {
        return None;
    }
    let is_type = |word: &str| TYPES.iter().any(|(name, _)| *name == word);
    let typed = |word: &str| {
        let rest = |start| word.strip_prefix(start).filter(|rest| rest.is_empty() || *rest == "i32" || is_type(rest));
        TYPES.iter().find(|(start, _)| rest(*start).is_some()).map(|(_, operand)| *operand)
    };
    let instruction = |word| INSTRUCTIONS.iter().find(|(name, _)| *name == word).map(|(_, operand)| *operand);
    name.split('_').find_map(typed).unwrap_or_else(|| name.split('_').find_map(instruction))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(names: &[&str]) -> [usize; 4] {
        let Products { int8, fp16, fp32, other, .. } = Products::count("1x16".parse().unwrap(), names);
        [int8, fp16, fp32, other]
    }

    #[test]
    fn kernels_of_tensorrt_are_told_apart_by_their_operands() {
        for (name, expected) in [
            // Seen in engines of TensorRT 8.6.0 on an H200.
            (
                "sm90_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x256x64_cgasize2x1x1_warpgroupsize2x1x1_gelu_erf_beta0_execute",
                [1, 0, 0, 0],
            ),
            (
                "sm90_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize128x128x64_cgasize2x2x1_warpgroupsize1x1x1_beta0_execute",
                [1, 0, 0, 0],
            ),
            (
                "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize128x64x8_stage3_warpsize2x2x1_ffma_aligna4_execute_kernel_trt",
                [0, 0, 1, 0],
            ),
            (
                "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize128x128x8_stage3_ffma_aligna4_execute_split_k_kernel_trt",
                [0, 0, 0, 0],
            ),
            (
                "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize128x64x64_stage3_warpsize2x2x1_tensor16x8x32_execute_kernel_trt",
                [1, 0, 0, 0],
            ),
            (
                "sm90_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize128x64x64_warpgroupsize1x1x1_beta0_execute_segment_k_off_kernel_trt",
                [0, 1, 0, 0],
            ),
            (
                "sm50_xmma_cublas_smallN_TN_f32f32_f32_f32_tn_n_cols_per_thread8cols_per_thread_bb9exact_colFalse_execute_kernel_trt",
                [0, 0, 1, 0],
            ),
            ("mha0", [0, 0, 0, 1]),
            ("__myl_bb0_14_CasSubMulResAddAddMaxSubExpSumDivMul", [0, 0, 0, 0]),
            ("[fill]", [0, 0, 0, 0]),
            // Other names of NVIDIA's libraries.
            (
                "sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize64x64x64_stage4_warpsize2x2x1_tensor16x8x16_execute_kernel_trt",
                [0, 1, 0, 0],
            ),
            ("sm90_xmma_gemm_f16f32_f16f32_f32_tn_n_tilesize64x64x64", [0, 1, 0, 0]),
            ("sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize32x32x64", [0, 0, 0, 1]),
            ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", [0, 0, 0, 1]),
            ("sm90_xmma_gemm_e4m3f16_e4m3f32_f32_tn_n", [0, 0, 0, 1]),
            ("cutlass_80_tensorop_i16832gemm_s8_128x128_64x4_tn_align16", [1, 0, 0, 0]),
            ("cutlass_80_tensorop_f16_s16816gemm_f16_128x128_32x5_tn_align8", [0, 1, 0, 0]),
            ("ampere_i16832gemm_int8_128x64_ldg16_stages_64x5_tn", [1, 0, 0, 0]),
            ("ampere_h16816gemm_128x64_ldg8_stages_64x4_tn", [0, 1, 0, 0]),
            ("ampere_sgemm_128x64_tn", [0, 0, 1, 0]),
            ("fmha_v2_flash_attention_fp16_S_64_D_64_sm90_kernel", [0, 1, 0, 0]),
            ("fmha_v2_int8_384_64_sm80_kernel", [1, 0, 0, 0]),
            ("_gemm_mha_v2_0x1234", [0, 0, 0, 1]),
        ] {
            assert_eq!(count(&[name]), expected, "{name}");
        }
    }

    #[test]
    fn counts_are_told_by_type() {
        let profile: Profile = "1x16".parse().unwrap();
        let names = ["a_gemm_i8f32_i8i32", "b_gemm_i8i8_i8i32", "c_gemm_f32f32_f32f32", "norm"];
        assert_eq!(Products::count(profile, &names).to_string(), "1x16: 2 int8, 1 fp32");
        assert_eq!(Products::count::<&str>(profile, &[]).to_string(), "1x16: none");
    }
}
