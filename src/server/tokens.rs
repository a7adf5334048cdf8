//! TEI's routes that show tokens: /tokenize and /decode.

use super::body::{self, Json};
use super::failure::Failure;
use super::inputs::{Rows, Texts};
use super::model::Model;
use super::state::State;
use super::work;
use crate::Result as LibraryResult;
use crate::tokens::DescribedToken;
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
    let (texts, prompt) = (request.inputs.into_list(), request.prompt_name.as_deref());
    let tokens = tokens(&state, &model, texts, prompt, request.add_special_tokens).await?;
    let numbers = tokens.iter().map(Vec::len).sum();
    body::answer(&state, tokens, numbers, None).await
}

/// Every token of every text.
///
/// # Errors
/// Nothing in a text, too many of them, a prompt that the model does not have.
pub(super) async fn tokens(
    state: &State,
    model: &Arc<Model>,
    texts: Vec<String>,
    prompt_name: Option<&str>,
    special: bool,
) -> Result<Vec<Vec<DescribedToken>>, Failure> {
    if texts.is_empty() || texts.iter().any(String::is_empty) {
        return Err(Failure::empty("inputs"));
    }
    work::check_count(state, texts.len(), "inputs")?;
    let (model, prompt) = (model.clone(), model.prompt(prompt_name)?);
    let tokenize = move || -> LibraryResult<_> {
        let describer = model.describer()?;
        let tokens = |(index, text): (usize, &String)| describer.tokens(index, &format!("{prompt}{text}"), special);
        texts.iter().enumerate().map(tokens).collect::<LibraryResult<Vec<_>>>()
    };
    Ok(work::aside(&state.helpers, tokenize).await??)
}

/// POST /decode: the texts of rows of ids.
pub(super) async fn decode(Shared(state): Shared<Arc<State>>, Json(request): Json<DecodeRequest>) -> Result<Response, Failure> {
    let model = state.model(request.model.as_deref())?;
    let texts = texts(&state, &model, request.ids.into_list(), request.skip_special_tokens).await?;
    body::answer(&state, texts, 0, None).await
}

/// The texts of rows of ids.
///
/// # Errors
/// Nothing in a row, too many of them, ids that the vocabulary does not have.
pub(super) async fn texts(
    state: &State,
    model: &Arc<Model>,
    rows: Vec<Vec<u32>>,
    skip_special: bool,
) -> Result<Vec<String>, Failure> {
    if rows.is_empty() || rows.iter().any(Vec::is_empty) {
        return Err(Failure::empty("ids"));
    }
    work::check_count(state, rows.len(), "ids")?;
    let model = model.clone();
    let decode = move || -> LibraryResult<_> {
        let describer = model.describer()?;
        let texts = rows.iter().enumerate().map(|(index, ids)| describer.decode(index, ids, skip_special));
        texts.collect::<LibraryResult<Vec<String>>>()
    };
    let texts = work::aside(&state.helpers, decode).await?;
    // The ids are not under `input`.
    texts.map_err(|error| Failure { param: Some("ids"), ..Failure::from(error) })
}
