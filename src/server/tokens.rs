//! TEI's routes that show tokens: /tokenize and /decode.

use super::body::{self, Json};
use super::failure::Failure;
use super::inputs::{Rows, Texts};
use super::state::State;
use super::work;
use crate::Result as LibraryResult;
use axum::extract::State as Shared;
use axum::response::Response;
use serde::Deserialize;
use std::sync::Arc;

/// Of /tokenize.
#[derive(Debug, Deserialize)]
pub(super) struct TokenizeRequest {
    inputs: Texts,
    #[serde(default = "body::yes")]
    add_special_tokens: bool,
    prompt_name: Option<String>,
    model: Option<String>,
}

/// Of /decode.
#[derive(Debug, Deserialize)]
pub(super) struct DecodeRequest {
    ids: Rows,
    #[serde(default = "body::yes")]
    skip_special_tokens: bool,
    model: Option<String>,
}

/// POST /tokenize: every token of every text, uncut. Places count bytes in the text with its prompt.
pub(super) async fn tokenize(
    Shared(state): Shared<Arc<State>>,
    Json(request): Json<TokenizeRequest>,
) -> Result<Response, Failure> {
    let model = state.model(request.model.as_deref())?;
    let texts = request.inputs.into_list();
    if texts.is_empty() || texts.iter().any(String::is_empty) {
        return Err(Failure::empty("inputs"));
    }
    work::check_count(&state, texts.len(), "inputs")?;
    let prompt = model.prompt(request.prompt_name.as_deref())?;
    let tokenize = move || -> LibraryResult<_> {
        let describer = model.describer()?;
        let tokens =
            |(index, text): (usize, &String)| describer.tokens(index, &format!("{prompt}{text}"), request.add_special_tokens);
        texts.iter().enumerate().map(tokens).collect::<LibraryResult<Vec<_>>>()
    };
    let tokens = work::aside(&state.helpers, tokenize).await??;
    let numbers = tokens.iter().map(Vec::len).sum();
    body::answer(&state, tokens, numbers, None).await
}

/// POST /decode: the texts of rows of ids.
pub(super) async fn decode(Shared(state): Shared<Arc<State>>, Json(request): Json<DecodeRequest>) -> Result<Response, Failure> {
    let model = state.model(request.model.as_deref())?;
    let rows = request.ids.into_list();
    if rows.is_empty() || rows.iter().any(Vec::is_empty) {
        return Err(Failure::empty("ids"));
    }
    work::check_count(&state, rows.len(), "ids")?;
    let decode = move || -> LibraryResult<_> {
        let describer = model.describer()?;
        let texts = rows.iter().enumerate().map(|(index, ids)| describer.decode(index, ids, request.skip_special_tokens));
        texts.collect::<LibraryResult<Vec<String>>>()
    };
    let texts = work::aside(&state.helpers, decode).await?;
    // The ids are not under `input`.
    let texts = texts.map_err(|error| Failure { param: Some("ids"), ..Failure::from(error) })?;
    body::answer(&state, texts, 0, None).await
}
