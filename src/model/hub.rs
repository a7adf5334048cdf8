//! Models by hub id (`org/name[@revision]`), downloaded once into the cache that other Hugging Face tools share.
