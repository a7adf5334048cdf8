//! The CPU backend: the exported graph run by `tract`.
