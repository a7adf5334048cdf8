//! How the command words the library's errors: settings by their flags, next steps by its verbs.

use trt_embed::{Error, Setting};

/// `error` as the command's users read it.
pub fn of(error: &Error) -> String {
    let said = match error {
        Error::Setting { setting, reason } => format!("{}: {reason}", flag(*setting).unwrap_or(setting.name())),
        other => other.to_string(),
    };
    said + hint(error)
}

/// The error and its causes on one line; a cause that the message before it already spells out is left out.
pub fn of_chain(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let said = cause.downcast_ref().map_or_else(|| cause.to_string(), of);
        if line.is_empty() {
            line = said;
        } else if !line.contains(&said) {
            line.push_str(": ");
            line.push_str(&said);
        }
    }
    line
}

/// The flag that gives `setting`; none where no flag does.
fn flag(setting: Setting) -> Option<&'static str> {
    Some(match setting {
        Setting::Calibration => "--calibration",
        Setting::ComputeCapability => "--compute-capability",
        Setting::Dim => "--dim",
        Setting::Engine => "--engine",
        Setting::Fp32Layers => "--fp32-layers",
        Setting::Invariant => "--invariant",
        Setting::KeepFloat => "--keep-float",
        Setting::MaxTokens => "--max-tokens",
        Setting::Percentile => "--percentile",
        Setting::Pooling => "--pooling",
        Setting::Precision => "--precision",
        Setting::Profiles => "--profile",
        Setting::PromptName => "--prompt",
        Setting::Smoothing => "--smooth-quant",
        Setting::TanhGelu => "--tanh-gelu",
        Setting::TokenTypes => "--token-types",
        _ => return None,
    })
}

/// How the command does what the error's next step says.
fn hint(error: &Error) -> &'static str {
    match error {
        Error::Setting { setting: Setting::Calibration, .. } => {
            "; --calibration goes with --precision int8 or auto, not with --onnx, and takes what `trt-embed calibrate` makes"
        }
        Error::EngineMismatch { .. } | Error::EngineFile { .. } => " with `trt-embed build`",
        Error::NotFound { what, .. } if what == "engine file" => " with `trt-embed build`",
        Error::CalibrationFile { .. } | Error::CalibrationMismatch { .. } => " with `trt-embed calibrate`",
        Error::OutsideProfile { .. } => " (--profile)",
        Error::NoReference { .. } => " (--reference FILE, --no-parity)",
        Error::Fidelity { .. } => " (`trt-embed build` with --precision, --min-cosine)",
        Error::GpuNotServed { .. } => " (--backend cuda)",
        Error::Unproven { .. } => " (without --require-proof)",
        Error::Cancelled { .. } => "; nothing was written",
        Error::NoPrecision { .. } => " (--min-cosine)",
        #[cfg(not(feature = "tensorrt"))]
        Error::Backend { backend: "tensorrt", .. } => " (--backend cpu)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;
    use clap::CommandFactory;

    /// The settings that no flag of the command gives.
    const WITHOUT_FLAG: [Setting; 5] = [Setting::Costs, Setting::Dense, Setting::EngineCache, Setting::HiddenSize, Setting::Ids];

    #[test]
    fn every_setting_has_a_flag_of_the_command_or_is_known_to_have_none() {
        let command = super::super::Args::command();
        let flags: Vec<String> = command
            .get_subcommands()
            .flat_map(|verb| verb.get_arguments())
            .filter_map(|argument| argument.get_long().map(|long| format!("--{long}")))
            .collect();
        for setting in Setting::ALL {
            match flag(setting) {
                Some(flag) => assert!(flags.iter().any(|known| known == flag), "{setting}: no verb has {flag}"),
                None => assert!(WITHOUT_FLAG.contains(&setting), "{setting} has no flag"),
            }
        }
    }

    #[test]
    fn errors_speak_of_flags_wherever_they_stand_in_a_chain() {
        let setting = || Error::Setting { setting: Setting::MaxTokens, reason: "33 is outside 1..=32".into() };
        assert_eq!(setting().to_string(), "max_tokens: 33 is outside 1..=32");
        assert_eq!(of(&setting()), "--max-tokens: 33 is outside 1..=32");
        let chained = anyhow::Error::new(setting()).context("cannot embed");
        assert_eq!(of_chain(&chained), "cannot embed: --max-tokens: 33 is outside 1..=32");
        let engine = Error::EngineMismatch { field: "gpu", expected: "a".into(), found: "b".into() };
        assert!(of(&engine).ends_with("; build it again with `trt-embed build`"), "{}", of(&engine));
        let calibration = Error::CalibrationMismatch { field: "model", expected: "a".into(), found: "b".into() };
        assert!(of(&calibration).ends_with("; calibrate the model again with `trt-embed calibrate`"), "{}", of(&calibration));
    }

    #[test]
    fn causes_are_joined_once() {
        let io = || std::io::Error::other("disk on fire");
        let repeated = anyhow::Error::new(io()).context("cannot write a: disk on fire");
        assert_eq!(of_chain(&repeated), "cannot write a: disk on fire");
        let chained = Err::<(), _>(io()).context("cannot write a").unwrap_err();
        assert_eq!(of_chain(&chained), "cannot write a: disk on fire");
    }
}
