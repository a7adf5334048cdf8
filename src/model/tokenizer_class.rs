//! Which tokenizer class transformers takes for a model folder, and what that class makes of tokenizer.json.

use crate::model::json::{config_error, shown};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// What a tokenizer class of transformers does with tokenizer.json.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TokenizerClass {
    /// `TokenizersBackend` (`PreTrainedTokenizerFast`): takes tokenizer.json as it is.
    Backend,
    /// `BertTokenizer` and its aliases: takes the vocabulary; normaliser, pre-tokenizer and post-processor are its own.
    Bert,
    /// `DPR*EncoderTokenizer`: as `BertTokenizer`, always in lower case.
    Dpr,
    /// `MPNetTokenizer`: as `BertTokenizer`, with MPNet's special tokens.
    MpNet,
    /// `XLMRobertaTokenizer`: takes a Unigram vocabulary and the precompiled character map.
    XlmRoberta,
    /// `CamembertTokenizer`: as `XLMRobertaTokenizer`, with CamemBERT's special tokens.
    Camembert,
    /// `RobertaTokenizer` and its aliases: takes a BPE vocabulary with its merges.
    Roberta,
}

/// Classes that are served, without the suffix `Fast`, which transformers takes off.
const SERVED: [(&str, TokenizerClass); 21] = [
    ("TokenizersBackend", TokenizerClass::Backend),
    ("PreTrainedTokenizer", TokenizerClass::Backend),
    ("PythonBackend", TokenizerClass::Backend),
    ("BloomTokenizer", TokenizerClass::Backend),
    ("BertTokenizer", TokenizerClass::Bert),
    ("DistilBertTokenizer", TokenizerClass::Bert),
    ("ElectraTokenizer", TokenizerClass::Bert),
    ("LayoutLMTokenizer", TokenizerClass::Bert),
    ("LxmertTokenizer", TokenizerClass::Bert),
    ("MobileBertTokenizer", TokenizerClass::Bert),
    ("SqueezeBertTokenizer", TokenizerClass::Bert),
    ("DPRContextEncoderTokenizer", TokenizerClass::Dpr),
    ("DPRQuestionEncoderTokenizer", TokenizerClass::Dpr),
    ("MPNetTokenizer", TokenizerClass::MpNet),
    ("XLMRobertaTokenizer", TokenizerClass::XlmRoberta),
    ("CamembertTokenizer", TokenizerClass::Camembert),
    ("RobertaTokenizer", TokenizerClass::Roberta),
    ("BartTokenizer", TokenizerClass::Roberta),
    ("LongformerTokenizer", TokenizerClass::Roberta),
    ("MvpTokenizer", TokenizerClass::Roberta),
    ("LEDTokenizer", TokenizerClass::Roberta),
];

/// Classes that transformers 5.24 knows and that rebuild the tokenizer in a way of their own, or have no fast form. A name that is
/// neither here nor above is unknown to transformers, which then takes tokenizer.json as it is.
const OTHERS: [&str; 95] = [
    "AlbertTokenizer",
    "AutoTokenizer",
    "BarthezTokenizer",
    "BartphoTokenizer",
    "BasicTokenizer",
    "BertGenerationTokenizer",
    "BertJapaneseTokenizer",
    "BertweetTokenizer",
    "BigBirdTokenizer",
    "BioGptTokenizer",
    "BlenderbotSmallTokenizer",
    "BlenderbotTokenizer",
    "ByT5Tokenizer",
    "CLIPTokenizer",
    "CTRLTokenizer",
    "CanineTokenizer",
    "CharacterTokenizer",
    "ClvpTokenizer",
    "CodeGenTokenizer",
    "CodeLlamaTokenizer",
    "CohereTokenizer",
    "ConvBertTokenizer",
    "CpmAntTokenizer",
    "CpmTokenizer",
    "DPRReaderTokenizer",
    "DebertaTokenizer",
    "DebertaV2Tokenizer",
    "DiaTokenizer",
    "EsmTokenizer",
    "EsmcTokenizer",
    "FNetTokenizer",
    "FSMTTokenizer",
    "FastSpeech2ConformerTokenizer",
    "FlaubertTokenizer",
    "FunnelTokenizer",
    "GPT2Tokenizer",
    "GPTNeoXJapaneseTokenizer",
    "GPTNeoXTokenizer",
    "GPTSw3Tokenizer",
    "GemmaTokenizer",
    "HerbertTokenizer",
    "LasrTokenizer",
    "LayoutLMv2Tokenizer",
    "LayoutLMv3Tokenizer",
    "LayoutXLMTokenizer",
    "LlamaTokenizer",
    "LukeTokenizer",
    "M2M100Tokenizer",
    "MBart50Tokenizer",
    "MBartTokenizer",
    "MLukeTokenizer",
    "MarianTokenizer",
    "MarkupLMTokenizer",
    "MecabTokenizer",
    "MgpstrTokenizer",
    "MistralCommonBackend",
    "MyT5Tokenizer",
    "NllbTokenizer",
    "NougatTokenizer",
    "OpenAIGPTTokenizer",
    "PLBartTokenizer",
    "ParakeetTokenizer",
    "PegasusTokenizer",
    "PerceiverTokenizer",
    "PhobertTokenizer",
    "Pop2PianoTokenizer",
    "ProphetNetTokenizer",
    "Qwen2Tokenizer",
    "Qwen3_5Tokenizer",
    "RagTokenizer",
    "ReformerTokenizer",
    "RemBertTokenizer",
    "RoCBertTokenizer",
    "RoFormerTokenizer",
    "SeamlessM4TTokenizer",
    "SentencePieceBackend",
    "Siglip2Tokenizer",
    "SiglipTokenizer",
    "Speech2TextTokenizer",
    "SpeechT5Tokenizer",
    "SplinterTokenizer",
    "T5Tokenizer",
    "TapasTokenizer",
    "Tipsv2Tokenizer",
    "TorchvisionBackend",
    "UdopTokenizer",
    "VideoPrismTokenizer",
    "VitsTokenizer",
    "Wav2Vec2CTCTokenizer",
    "Wav2Vec2PhonemeCTCTokenizer",
    "WhisperTokenizer",
    "WordpieceTokenizer",
    "XGLMTokenizer",
    "XLMTokenizer",
    "XLNetTokenizer",
];

/// Classes written in Python alone: saving them with transformers gives no tokenizer.json.
const WITHOUT_FAST_FORM: [&str; 14] = [
    "BertJapaneseTokenizer",
    "BartphoTokenizer",
    "BertweetTokenizer",
    "BioGptTokenizer",
    "ByT5Tokenizer",
    "CTRLTokenizer",
    "CanineTokenizer",
    "CpmAntTokenizer",
    "FlaubertTokenizer",
    "FSMTTokenizer",
    "PhobertTokenizer",
    "ProphetNetTokenizer",
    "RoCBertTokenizer",
    "XLMTokenizer",
];

/// The class that transformers registers for a `model_type` (`TOKENIZER_MAPPING_NAMES`); `None` for the plain backend.
fn registered(model_type: &str) -> Option<&'static str> {
    match model_type {
        "bert" | "distilbert" | "electra" | "nomic_bert" | "ernie" | "megatron-bert" => Some("BertTokenizer"),
        "mpnet" => Some("MPNetTokenizer"),
        "xlm-roberta" | "xmod" | "gte" => Some("XLMRobertaTokenizer"),
        "camembert" => Some("CamembertTokenizer"),
        "roberta" | "roberta-prelayernorm" => Some("RobertaTokenizer"),
        _ => None,
    }
}

impl TokenizerClass {
    /// The name of the class, as transformers writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Backend => "TokenizersBackend",
            Self::Bert => "BertTokenizer",
            Self::Dpr => "DPRContextEncoderTokenizer",
            Self::MpNet => "MPNetTokenizer",
            Self::XlmRoberta => "XLMRobertaTokenizer",
            Self::Camembert => "CamembertTokenizer",
            Self::Roberta => "RobertaTokenizer",
        }
    }

    /// Whether the class can be built from vocab.txt where there is no tokenizer.json.
    pub(super) fn reads_vocab_txt(self) -> bool {
        matches!(self, Self::Bert | Self::Dpr | Self::MpNet)
    }

    /// As `AutoTokenizer` chooses: `tokenizer_class` of tokenizer_config.json, else that of config.json, else the one registered for
    /// the model type. `modernbert` is in transformers' list of models whose folders name a wrong class.
    pub(super) fn choose(
        config_path: &Path,
        config: &Map<String, Value>,
        model_type: &str,
        model_class: Option<&str>,
    ) -> Result<Self> {
        if let Some(map) = config.get("auto_map").filter(|map| !map.is_null()) {
            let reason = format!("auto_map is {}; tokenizers with code of their own are not supported", shown(map));
            return Err(config_error(config_path, reason));
        }
        let own = match config.get("tokenizer_class") {
            None | Some(Value::Null) => None,
            Some(Value::String(name)) => Some(name.as_str()),
            Some(other) => {
                let reason = format!("tokenizer_class is {}; a string is expected", shown(other));
                return Err(config_error(config_path, reason));
            }
        };
        let Some(name) = own.or(model_class) else {
            let named = registered(model_type).and_then(served);
            return Ok(named.unwrap_or(Self::Backend));
        };
        if model_type == "modernbert" {
            return Ok(Self::Backend);
        }
        let plain = name.strip_suffix("Fast").unwrap_or(name);
        match served(plain) {
            Some(class) => Ok(class),
            None if OTHERS.contains(&plain) => Err(refused(config_path, own.is_some(), plain, name)),
            None => Ok(Self::Backend),
        }
    }
}

fn served(name: &str) -> Option<TokenizerClass> {
    SERVED.iter().find(|(served, _)| *served == name).map(|&(_, class)| class)
}

fn refused(config_path: &Path, own: bool, plain: &str, name: &str) -> Error {
    let config = config_path.with_file_name("config.json");
    let path = if own { config_path } else { &config };
    let why = match WITHOUT_FAST_FORM.contains(&plain) {
        true => "this tokenizer has no fast form (transformers cannot save a tokenizer.json for it); choose another model",
        false => "this tokenizer builds its parts in a way that is not supported; choose another model",
    };
    config_error(path, format!("tokenizer_class is \"{name}\"; {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn choose(config: Value, model_type: &str, model_class: Option<&str>) -> Result<TokenizerClass> {
        let Value::Object(config) = config else { unreachable!() };
        TokenizerClass::choose(Path::new("m/tokenizer_config.json"), &config, model_type, model_class)
    }

    #[test]
    fn classes_are_chosen_as_auto_tokenizer_does() {
        use TokenizerClass::{Backend, Bert, Camembert, Dpr, MpNet, Roberta, XlmRoberta};
        let named = |name: &str| json!({"tokenizer_class": name});
        for (config, model_type, model_class, expected) in [
            (json!({}), "bert", None, Bert),
            (json!({}), "mpnet", None, MpNet),
            (json!({"tokenizer_class": null}), "xlm-roberta", None, XlmRoberta),
            (json!({}), "camembert", None, Camembert),
            (json!({}), "roberta", None, Roberta),
            (json!({}), "distilbert", None, Bert),
            (named("CamembertTokenizerFast"), "roberta", None, Camembert),
            (named("RobertaTokenizer"), "camembert", None, Roberta),
            (json!({}), "modernbert", None, Backend),
            (json!({}), "bert", Some("XLMRobertaTokenizer"), XlmRoberta),
            (named("PreTrainedTokenizerFast"), "bert", Some("BertTokenizer"), Backend),
            (named("BertTokenizerFast"), "mpnet", None, Bert),
            (named("ElectraTokenizerFast"), "bert", None, Bert),
            (named("DPRQuestionEncoderTokenizer"), "bert", None, Dpr),
            (named("RobertaTokenizerFast"), "mpnet", None, Roberta),
            (named("GPT2Tokenizer"), "modernbert", None, Backend),
            (named("RetriBertTokenizer"), "bert", None, Backend),
        ] {
            assert_eq!(choose(config.clone(), model_type, model_class).unwrap(), expected, "{config} {model_type}");
        }
    }

    #[test]
    fn classes_that_cannot_be_served_are_refused_by_name() {
        for (config, model_class, parts) in [
            (
                json!({"tokenizer_class": "BertJapaneseTokenizer"}),
                None,
                ["m/tokenizer_config.json", "BertJapaneseTokenizer", "no fast form"],
            ),
            (json!({}), Some("GPT2TokenizerFast"), ["m/config.json", "GPT2TokenizerFast", "not supported"]),
            (
                json!({"auto_map": {"AutoTokenizer": [null, "a.B"]}}),
                None,
                ["m/tokenizer_config.json", "a.B", "code of their own"],
            ),
            (json!({"tokenizer_class": 3}), None, ["m/tokenizer_config.json", "tokenizer_class is 3", "string"]),
        ] {
            let error = choose(config, "bert", model_class).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }
}
