//! What is done with the keys of `config.json` that families share; those of one family stand in its own file.

use super::schema::Key;

pub(super) const TRAINING: &str = "of training alone";
const GENERATION: &str = "of text generation alone";
pub(super) const HEADS: &str = "of heads that are not read";
const ARITHMETIC: &str = "how the reference computes, not what";
const TOKENIZER: &str = "the tokenizer's own files say";
const ORIGIN: &str = "where the model comes from";

/// The key of every `config.json`.
pub(super) const MODEL_TYPE: &[Key] = &[Key::honoured("model_type", "which family the encoder is of")];

/// Keys of [`SizeKeys::BERT`](super::config::SizeKeys::BERT).
pub(super) const SIZES: &[Key] = &[
    Key::honoured("hidden_size", "width of a hidden state (768)"),
    Key::honoured("num_hidden_layers", "transformer layers (12)"),
    Key::honoured("num_attention_heads", "attention heads (12); divides hidden_size"),
    Key::honoured("intermediate_size", "width of the feed-forward part (3072)"),
    Key::honoured("vocab_size", "rows of the token embedding table"),
    Key::honoured("layer_norm_eps", "epsilon of every LayerNorm (1e-12)"),
];

/// Of families whose configuration names the feed-forward part's activation so.
pub(super) const ACTIVATION: &[Key] = &[Key::honoured("hidden_act", "activation of the feed-forward part (gelu)")];

/// Of families with a table of positions.
pub(super) const POSITION_ROWS: &[Key] =
    &[Key::honoured("max_position_embeddings", "rows of the position embedding table (512)")];

/// Of families whose reference is transformers' own code.
pub(super) const CODE: &[Key] =
    &[Key::only("auto_map", &["{}"], "the model is computed by Python code of its own, which is not run")];

/// Keys that mean the same in every family.
pub(super) const COMMON: &[Key] = &[
    Key::honoured("tokenizer_class", "read where tokenizer_config.json names no class"),
    Key::only("quantization_config", &["{}"], "quantised weights are not read; save the model in fp32, fp16 or bf16"),
    Key::only("is_encoder_decoder", &["false"], "only encoders are supported"),
    Key::only("is_decoder", &["false"], "only encoders are supported"),
    Key::only("transformers_weights", &[], "weights of another file's name are not read; rename it to model.safetensors"),
    Key::only("fusion_config", &["{}"], "parts fused in another way are not supported"),
    Key::only("add_cross_attention", &["false"], "only encoders are supported"),
    Key::only("pruned_heads", &["{}"], "pruned heads are not supported; save the model again with a newer transformers"),
    Key::only("per_layer_config", &["{}", "[]"], "layers that differ from each other are not supported"),
    Key::only("adapters", &["{}"], "adapters of AdapterHub are not read; merge them and save the model"),
    Key::only("adapter_fusion_config", &["{}"], "adapters of AdapterHub are not read; merge them and save the model"),
    Key::harmless("_name_or_path", ORIGIN),
    Key::harmless("name_or_path", ORIGIN),
    Key::harmless("_commit_hash", ORIGIN),
    Key::harmless("architectures", "the classes that the weights were saved from; tensors are looked up by name"),
    Key::harmless("transformers_version", ORIGIN),
    Key::harmless("adapter_transformers_version", ORIGIN),
    Key::harmless("model_name", ORIGIN),
    Key::harmless("pretraining", ORIGIN),
    Key::harmless("language", ORIGIN),
    Key::harmless("name", ORIGIN),
    Key::harmless("torch_dtype", "the weights' own types count; arithmetic is the executor's"),
    Key::harmless("dtype", "the weights' own types count; arithmetic is the executor's"),
    Key::harmless("_attn_implementation", ARITHMETIC),
    Key::harmless("attn_implementation", ARITHMETIC),
    Key::harmless("_attn_implementation_autoset", ARITHMETIC),
    Key::harmless("chunk_size_feed_forward", ARITHMETIC),
    Key::harmless("torchscript", ARITHMETIC),
    Key::harmless("use_bfloat16", ARITHMETIC),
    Key::harmless("return_dict", "shape of the reference's answer"),
    Key::harmless("return_dict_in_generate", GENERATION),
    Key::harmless("output_hidden_states", "further outputs"),
    Key::harmless("output_attentions", "further outputs"),
    Key::harmless("output_past", "further outputs"),
    Key::harmless("output_scores", GENERATION),
    Key::harmless("use_cache", "of decoders alone"),
    Key::harmless("cross_attention_hidden_size", "of decoders alone"),
    Key::harmless("tie_word_embeddings", HEADS),
    Key::harmless("tie_encoder_decoder", "of decoders alone"),
    Key::harmless("decoder_start_token_id", "of decoders alone"),
    Key::harmless("hidden_dropout_prob", TRAINING),
    Key::harmless("attention_probs_dropout_prob", TRAINING),
    Key::harmless("classifier_dropout", HEADS),
    Key::harmless("initializer_range", TRAINING),
    Key::harmless("gradient_checkpointing", TRAINING),
    Key::harmless("finetuning_task", TRAINING),
    Key::harmless("task_specific_params", GENERATION),
    Key::harmless("problem_type", HEADS),
    Key::harmless("id2label", HEADS),
    Key::harmless("label2id", HEADS),
    Key::harmless("num_labels", HEADS),
    Key::harmless("_num_labels", HEADS),
    Key::harmless("bos_token_id", TOKENIZER),
    Key::harmless("eos_token_id", TOKENIZER),
    Key::harmless("sep_token_id", TOKENIZER),
    Key::harmless("cls_token_id", TOKENIZER),
    Key::harmless("mask_token_id", TOKENIZER),
    Key::harmless("prefix", TOKENIZER),
    Key::harmless("max_length", GENERATION),
    Key::harmless("min_length", GENERATION),
    Key::harmless("do_sample", GENERATION),
    Key::harmless("early_stopping", GENERATION),
    Key::harmless("num_beams", GENERATION),
    Key::harmless("num_beam_groups", GENERATION),
    Key::harmless("num_return_sequences", GENERATION),
    Key::harmless("diversity_penalty", GENERATION),
    Key::harmless("temperature", GENERATION),
    Key::harmless("top_k", GENERATION),
    Key::harmless("top_p", GENERATION),
    Key::harmless("typical_p", GENERATION),
    Key::harmless("repetition_penalty", GENERATION),
    Key::harmless("length_penalty", GENERATION),
    Key::harmless("no_repeat_ngram_size", GENERATION),
    Key::harmless("encoder_no_repeat_ngram_size", GENERATION),
    Key::harmless("bad_words_ids", GENERATION),
    Key::harmless("forced_bos_token_id", GENERATION),
    Key::harmless("forced_eos_token_id", GENERATION),
    Key::harmless("remove_invalid_values", GENERATION),
    Key::harmless("exponential_decay_length_penalty", GENERATION),
    Key::harmless("suppress_tokens", GENERATION),
    Key::harmless("begin_suppress_tokens", GENERATION),
    Key::harmless("tf_legacy_loss", TRAINING),
];
