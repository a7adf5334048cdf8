//! The choice of a precision: engines in each that may serve, and the fastest of those that are true enough to the model.

use super::pipeline::{EngineRequest, Job, half_precision, misplaced_calibration, phase, phase_alone};
use super::timing::{Measured, measure, speeds};
use super::{proof, source};
use crate::cuda::Device;
use crate::graph::Quantization;
use crate::quantization::Calibration;
#[cfg(feature = "cpu")]
use crate::quantization::{Samples, choose_float};
use crate::tensorrt::engine_file::{Cache, EngineFile, Fidelity, Manifest};
use crate::tensorrt::library::{Arithmetic, Library, Target};
use crate::{Error, Progress, Result, Setting};
use std::sync::Arc;

/// Which engine to build in whichever precision is fastest.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct FastestRequest<'a> {
    /// The model, the shapes and the gate, whose standard bar is each precision's own. `settings.arithmetic` does not count, and
    /// `quantization` must be `None`: each candidate has its own.
    pub engine: EngineRequest<'a>,
    /// Ranges of the model's activations. Without them int8 is no candidate.
    pub calibration: Option<&'a Calibration>,
    /// Names of linears that the int8 engine leaves in float. Where there is none, `quantization::choose_float` finds the fewest with which
    /// the model in INT8 reaches the gate's bar on the CPU; without a gate all linears are quantised.
    pub keep_float: &'a [String],
}

/// A precision that [`build_fastest`] considered.
#[derive(Debug)]
pub struct Candidate {
    /// The precision.
    pub arithmetic: Arithmetic,
    /// Microseconds of GPU time of the encoder at the largest shape of each profile, in the order of the profiles. Empty where no
    /// engine was built.
    pub micros: Vec<f64>,
    /// How near the engine is to the model; `None` where that was not measured.
    pub fidelity: Option<Fidelity>,
    /// Why it cannot be chosen: [`Error::Fidelity`] or [`Error::QuantizedFidelity`] below the bar, [`Error::Setting`] for a GPU
    /// without 8-bit arithmetic. `None` where only time decides.
    pub refused: Option<Error>,
}

/// What [`build_fastest`] found.
#[derive(Debug)]
#[non_exhaustive]
pub struct Fastest {
    /// The engine of the precision that won. [`Manifest::speed`](crate::tensorrt::Manifest::speed) has its times beside the others'.
    pub engine: EngineFile,
    /// All precisions that were considered, the chosen one among them; in the order int8, fp16, fp32.
    pub candidates: Vec<Candidate>,
    /// What the int8 candidate leaves in float and why, where that was to be found.
    #[cfg(feature = "cpu")]
    pub fitted: Option<crate::quantization::QuantizationReport>,
}

impl<'a> FastestRequest<'a> {
    /// The fastest engine of `engine`'s model, without int8.
    pub fn new(engine: EngineRequest<'a>) -> Self {
        Self { engine, calibration: None, keep_float: &[] }
    }

    /// Checks what needs neither TensorRT nor a GPU.
    ///
    /// # Errors
    /// As [`EngineRequest::check`]; [`Error::Setting`] for a calibration beside an ONNX file, linears to keep without a calibration,
    /// and an ONNX file that is quantised; [`Error::CalibrationMismatch`] for another model's; [`Error::Io`] and [`Error::Onnx`].
    pub fn check(&self) -> Result<()> {
        self.candidate(Arithmetic::Fp16).check()?;
        let refused = |setting, reason| Err(Error::Setting { setting, reason });
        match (self.engine.onnx, self.calibration) {
            (Some(_), Some(_)) => return Err(misplaced_calibration()),
            (Some(path), None) if source::is_quantised(path)? => {
                let reason = format!("{} is quantised, which fp16 and fp32 engines cannot be: use int8", path.display());
                return refused(Setting::Precision, reason);
            }
            (None, Some(calibration)) => calibration.check(self.engine.folder, None)?,
            _ => {}
        }
        match self.calibration {
            None if !self.keep_float.is_empty() => refused(Setting::KeepFloat, "it goes with a calibration".into()),
            _ => Ok(()),
        }
    }

    fn candidate(&self, arithmetic: Arithmetic) -> EngineRequest<'a> {
        let mut request = self.engine.clone();
        request.settings.arithmetic = arithmetic;
        request
    }
}

impl Candidate {
    /// What precisions are compared by: the geometric mean of [`Candidate::micros`], to which a profile of short rows that runs twice as
    /// fast is worth as much as one of long rows that does. `None` where no engine was built.
    pub fn mean_micros(&self) -> Option<f64> {
        let logarithms: f64 = self.micros.iter().map(|micros| micros.ln()).sum();
        (!self.micros.is_empty()).then(|| (logarithms / self.micros.len() as f64).exp())
    }
}

/// Builds the engine that `request` asks for in the precision that is fastest among those that pass the gate.
///
/// fp16 is always a candidate, int8 where there is a calibration and the GPU has 8-bit arithmetic; fp32 is built only where none of them
/// passes. All that were built are timed one after the other, and the smallest [`Candidate::mean_micros`] wins; of equal ones the more
/// exact. Without a gate time alone decides. The fp16 engine comes from `cache`, which it is built into where it is not there; other
/// engines are not put into it. Takes the minutes of up to three builds.
///
/// # Errors
/// As [`FastestRequest::check`] and [`build_engine`](super::build_engine), but for a candidate that misses its bar, which is told in its
/// [`Candidate::refused`]; [`Error::NoPrecision`] where all do; [`Error::Setting`] for a name in `keep_float` that is no linear;
/// [`Error::TensorRt`] from TensorRT 10 on for an ONNX file in fp32, which cannot be built as fp16 there.
pub fn build_fastest(
    library: &Arc<Library>,
    device: &Device,
    cache: &Cache,
    request: &FastestRequest<'_>,
    progress: &dyn Progress,
) -> Result<Fastest> {
    request.check()?;
    let EngineRequest { folder, gate, reference, .. } = request.engine;
    let reference = || proof::reference(folder, &request.engine.profiles(), reference);
    // First, because what is wrong with it shows in seconds. Either all candidates have a bar or none.
    let reference =
        gate.bar(Arithmetic::Fp16).map(|_| phase(progress, "embedding the texts to compare", reference)).transpose()?;
    let mut contest = Contest {
        library,
        device,
        cache,
        request,
        progress,
        reference,
        entrants: Vec::new(),
        #[cfg(feature = "cpu")]
        fitted: None,
    };
    if let Some(calibration) = request.calibration {
        phase(progress, "the int8 candidate", || contest.enter_int8(calibration))?;
    }
    phase(progress, "the fp16 candidate", || contest.enter_fp16())?;
    if contest.entrants.iter().all(|entrant| entrant.candidate.refused.is_some()) {
        phase(progress, "the fp32 candidate", || contest.enter_fp32())?;
    }
    // The times choose the winner.
    phase_alone(progress, cache, "measuring the engines", || contest.measure())?;
    contest.decide()
}

/// The fastest of the candidates that are not refused, by its place; of equally fast ones the more exact.
fn fastest<'c>(candidates: impl IntoIterator<Item = &'c Candidate>) -> Option<usize> {
    let taken = candidates.into_iter().enumerate().filter(|(_, candidate)| candidate.refused.is_none());
    let timed = taken.filter_map(|(place, candidate)| Some((place, candidate.mean_micros()?, candidate.arithmetic)));
    // The variants of `Arithmetic` stand in this order, the most exact first.
    let order = |(_, a, exact): &(usize, f64, Arithmetic), (_, b, other): &(usize, f64, Arithmetic)| {
        a.total_cmp(b).then((*exact as u8).cmp(&(*other as u8)))
    };
    timed.min_by(order).map(|(place, ..)| place)
}

/// Why there is no engine to choose.
fn none_passes(candidates: impl IntoIterator<Item = Candidate>) -> Error {
    let reason = |candidate: Candidate| Some((candidate.arithmetic.to_string(), candidate.refused?));
    Error::NoPrecision {
        refused: candidates.into_iter().filter_map(reason).collect(),
        next: "A lower bar accepts less; where even fp32 misses it, graph and weights may not belong together.",
    }
}

/// A candidate and its engine, where one was built.
struct Entrant {
    candidate: Candidate,
    engine: Option<EngineFile>,
}

/// The candidates under way, and what all of them are built with and compared to.
struct Contest<'a> {
    library: &'a Arc<Library>,
    device: &'a Device,
    cache: &'a Cache,
    request: &'a FastestRequest<'a>,
    progress: &'a dyn Progress,
    reference: Option<proof::Oracle>,
    entrants: Vec<Entrant>,
    #[cfg(feature = "cpu")]
    fitted: Option<crate::quantization::QuantizationReport>,
}

impl Contest<'_> {
    fn enter_int8(&mut self, calibration: &Calibration) -> Result<()> {
        if let Err(reason) = Target::from(self.device).check_int8() {
            return self.refuse_int8(reason);
        }
        match self.quantise(calibration) {
            Ok(quantization) => {
                let request = self.request.candidate(Arithmetic::Int8);
                self.build(&EngineRequest { quantization: Some(&quantization), ..request })
            }
            Err(reason @ Error::QuantizedFidelity { .. }) => self.refuse_int8(reason),
            Err(other) => Err(other),
        }
    }

    fn refuse_int8(&mut self, reason: Error) -> Result<()> {
        log::warn!("int8 is no candidate: {reason}");
        let candidate = Candidate { arithmetic: Arithmetic::Int8, micros: Vec::new(), fidelity: None, refused: Some(reason) };
        self.entrants.push(Entrant { candidate, engine: None });
        Ok(())
    }

    /// As told, or so that the model keeps to the bar on the CPU.
    #[cfg(feature = "cpu")]
    fn quantise(&mut self, calibration: &Calibration) -> Result<Quantization> {
        let FastestRequest { engine, keep_float, .. } = self.request;
        let bar = engine.gate.bar(Arithmetic::Int8);
        let choose = || choose_float(engine.folder, calibration, &Samples::of_all_lengths(engine.folder)?, keep_float, bar);
        let (quantization, report) = phase(self.progress, "choosing what INT8 may take", choose)?;
        self.fitted = report;
        Ok(quantization)
    }

    /// As told.
    #[cfg(not(feature = "cpu"))]
    fn quantise(&mut self, calibration: &Calibration) -> Result<Quantization> {
        Ok(calibration.quantization(self.request.keep_float.iter().cloned()))
    }

    /// Out of the cache, where what other builds left may not have been compared.
    fn enter_fp16(&mut self) -> Result<()> {
        let (mut engine, path) = half_precision(self.library, self.device, self.cache, &self.request.engine, self.progress)?;
        let unproven = engine.manifest.fidelity.is_none();
        let refused = self.compare(&mut engine)?;
        if unproven && engine.manifest.fidelity.is_some() && refused.is_none() {
            EngineFile::write(&path, &engine.manifest, engine.plan())?;
        }
        self.enter(engine, refused);
        Ok(())
    }

    fn enter_fp32(&mut self) -> Result<()> {
        self.build(&self.request.candidate(Arithmetic::Fp32))
    }

    fn build(&mut self, request: &EngineRequest<'_>) -> Result<()> {
        let job = Job::new(self.library, self.device.into(), self.cache, request, self.progress)?;
        let lock = self.cache.lock(self.progress)?;
        let mut engine = job.build_unproven()?;
        drop(lock);
        let refused = self.compare(&mut engine)?;
        self.enter(engine, refused);
        Ok(())
    }

    /// Measures how true `engine` is, where the gate asks for it, and says why it is not taken where that is too little.
    fn compare(&self, engine: &mut EngineFile) -> Result<Option<Error>> {
        let EngineRequest { folder, gate, .. } = self.request.engine;
        let arithmetic = engine.manifest.arithmetic;
        let (Some(bar), Some(reference)) = (gate.bar(arithmetic), &self.reference) else { return Ok(None) };
        let compare = || proof::compare(self.library, self.device, folder, engine, reference, bar);
        // What the engine's shapes cost is measured there, too.
        let verdict = phase_alone(self.progress, self.cache, &format!("comparing {arithmetic} with the reference"), compare)?;
        Ok(verdict.err())
    }

    fn enter(&mut self, engine: EngineFile, refused: Option<Error>) {
        let Manifest { arithmetic, fidelity, .. } = &engine.manifest;
        let candidate = Candidate { arithmetic: *arithmetic, micros: Vec::new(), fidelity: fidelity.clone(), refused };
        self.entrants.push(Entrant { candidate, engine: Some(engine) });
    }

    /// One right after the other, refused ones too: what the bar costs is worth knowing.
    fn measure(&mut self) -> Result<()> {
        for Entrant { candidate, engine } in &mut self.entrants {
            if let Some(engine) = engine {
                candidate.micros = measure(self.library, self.device, self.request.engine.folder, engine)?;
            }
        }
        Ok(())
    }

    fn decide(self) -> Result<Fastest> {
        let chosen = fastest(self.entrants.iter().map(|entrant| &entrant.candidate));
        let (candidates, mut engines): (Vec<_>, Vec<_>) =
            self.entrants.into_iter().map(|entrant| (entrant.candidate, entrant.engine)).unzip();
        let Some((place, mut engine)) = chosen.and_then(|place| Some((place, engines.swap_remove(place)?))) else {
            return Err(none_passes(candidates));
        };
        let other = |arithmetic| {
            let mut others = candidates.iter().enumerate().filter(|(number, _)| *number != place);
            others.find(|(_, other)| other.arithmetic == arithmetic).map(|(_, other)| other.micros.as_slice())
        };
        let beside = Measured { fp16: other(Arithmetic::Fp16), int8: other(Arithmetic::Int8) };
        engine.manifest.speed = speeds(&engine.manifest.profiles, &candidates[place].micros, beside);
        Ok(Fastest {
            engine,
            candidates,
            #[cfg(feature = "cpu")]
            fitted: self.fitted,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(arithmetic: Arithmetic, micros: &[f64]) -> Candidate {
        Candidate { arithmetic, micros: micros.into(), fidelity: None, refused: None }
    }

    fn refused(arithmetic: Arithmetic, micros: &[f64], bar: f64) -> Candidate {
        let reason = Error::Fidelity {
            measured: "the smallest cosine is 0.5".into(),
            min_cosine: Some(0.5),
            bar,
            profile: "1x16".into(),
            tokens: 9,
            next: "Accept less.",
        };
        Candidate { refused: Some(reason), ..candidate(arithmetic, micros) }
    }

    #[test]
    fn the_smallest_geometric_mean_wins_in_whatever_order_they_stand() {
        let (int8, fp16) = ([50.0, 3000.0], [100.0, 1000.0]);
        // Int8 is ahead at the short shape, fp16 by more at the long one: 387 us against 316 us.
        let candidates = [candidate(Arithmetic::Int8, &int8), candidate(Arithmetic::Fp16, &fp16)];
        assert_eq!(fastest(&candidates), Some(1));
        assert_eq!(fastest(candidates.iter().rev()), Some(0));
        assert!((candidates[0].mean_micros().unwrap() - 150_000f64.sqrt()).abs() < 1e-9);
        // The arithmetic mean would say the same there, and the contrary here: 173 us against 200 us.
        let candidates = [candidate(Arithmetic::Int8, &[20.0, 1500.0]), candidate(Arithmetic::Fp16, &[40.0, 1000.0])];
        assert_eq!(fastest(&candidates), Some(0));
    }

    #[test]
    fn of_equally_fast_ones_the_more_exact_wins() {
        let candidates = [Arithmetic::Int8, Arithmetic::Fp16, Arithmetic::Fp32].map(|kind| candidate(kind, &[7.0, 9.0]));
        assert_eq!(fastest(&candidates), Some(2));
        assert_eq!(fastest(&candidates[..2]), Some(1));
        assert_eq!(fastest(candidates[..2].iter().rev()), Some(0));
    }

    #[test]
    fn what_is_refused_or_was_not_built_never_wins() {
        let slow = candidate(Arithmetic::Fp16, &[900.0]);
        assert_eq!(fastest([&refused(Arithmetic::Int8, &[1.0], 0.99), &slow]), Some(1));
        assert_eq!(fastest([&refused(Arithmetic::Int8, &[], 0.99), &slow]), Some(1));
        assert_eq!(fastest([&slow]), Some(0));
        assert_eq!(fastest([&refused(Arithmetic::Int8, &[1.0], 0.99), &refused(Arithmetic::Fp16, &[2.0], 0.9999)]), None);
        assert_eq!(fastest([]), None);
        assert_eq!(refused(Arithmetic::Int8, &[], 0.99).mean_micros(), None);
    }

    #[test]
    fn where_none_passes_each_reason_is_told_and_what_to_do() {
        let error = none_passes([
            refused(Arithmetic::Int8, &[], 0.99),
            refused(Arithmetic::Fp16, &[5.0], 0.9999),
            refused(Arithmetic::Fp32, &[9.0], 0.99999),
        ]);
        let Error::NoPrecision { refused, .. } = &error else { panic!("{error}") };
        let told: Vec<_> = refused
            .iter()
            .map(|(name, reason)| match reason {
                Error::Fidelity { bar, .. } => (name.as_str(), *bar),
                other => panic!("{other}"),
            })
            .collect();
        assert_eq!(told, [("int8", 0.99), ("fp16", 0.9999), ("fp32", 0.99999)]);
        let text = error.to_string();
        for part in ["\n  int8: the engine is not true", "\n  fp32: the engine is not true", "0.9999 is asked for", "lower bar"] {
            assert!(text.contains(part), "no {part:?} in: {text}");
        }
    }

    #[cfg(feature = "cpu")]
    #[test]
    fn what_cannot_work_is_said_before_anything_is_built() {
        use crate::graph::{Graph, Precision};
        use crate::model::ModelFolder;
        use crate::quantization::{CalibrationSettings, Samples, calibrate};

        let fixture = |name: &str| ModelFolder::open(format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let (folder, other) = (fixture("bert"), fixture("mpnet"));
        let place = tempfile::tempdir().unwrap();
        let samples = Samples::from_ids(&folder, (1..33).map(|id| vec![id; 4]).collect()).unwrap();
        let calibration = calibrate(&folder, &samples, &CalibrationSettings::default(), &crate::NoProgress).unwrap();
        let plain = FastestRequest::new(EngineRequest::new(&folder));
        plain.check().unwrap();
        let calibrated = FastestRequest { calibration: Some(&calibration), ..plain.clone() };
        calibrated.check().unwrap();

        let of_other = FastestRequest { engine: EngineRequest::new(&other), ..calibrated.clone() };
        assert!(matches!(of_other.check(), Err(Error::CalibrationMismatch { field: "model", .. })));
        let setting = |request: &FastestRequest<'_>| match request.check() {
            Err(Error::Setting { setting, .. }) => setting,
            other => panic!("{other:?}"),
        };
        let names = ["encoder.layer.0.output.dense".to_owned()];
        FastestRequest { keep_float: &names, ..calibrated.clone() }.check().unwrap();
        assert_eq!(setting(&FastestRequest { keep_float: &names, ..plain.clone() }), Setting::KeepFloat);
        let quantization = Quantization::default();
        let engine = EngineRequest { quantization: Some(&quantization), ..plain.engine.clone() };
        assert_eq!(setting(&FastestRequest::new(engine)), Setting::Calibration);

        let file = |name: &str, graph: Graph| {
            let path = place.path().join(name);
            graph.write(&path).unwrap();
            path
        };
        let architecture = folder.architecture().unwrap();
        let float = file("float.onnx", Graph::new(&architecture, Precision::Fp32).unwrap());
        let all = calibration.quantization([]);
        let quantised = file("int8.onnx", Graph::quantized(&architecture, Precision::Fp32, &all).unwrap());
        let of_file = |path| FastestRequest::new(EngineRequest { onnx: Some(path), ..EngineRequest::new(&folder) });
        of_file(&float).check().unwrap();
        assert_eq!(setting(&FastestRequest { calibration: Some(&calibration), ..of_file(&float) }), Setting::Calibration);
        assert_eq!(setting(&of_file(&quantised)), Setting::Precision);
        assert!(of_file(&quantised).check().unwrap_err().to_string().contains("use int8"));
    }
}
