//! Values as bytes and back, for tokenizers that are kept on disk. Nothing that is read is trusted: a length that does not fit is `None`.

/// Puts values behind each other.
#[derive(Debug, Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub fn number(&mut self, number: u64) {
        self.0.extend(number.to_le_bytes());
    }

    pub fn flag(&mut self, flag: bool) {
        self.0.push(flag.into());
    }

    pub fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.extend(text.as_bytes());
    }

    /// Numbers in rows of `N`.
    pub fn records<const N: usize>(&mut self, records: impl ExactSizeIterator<Item = [u32; N]>) {
        self.number(records.len() as u64);
        self.0.reserve(records.len() * 4 * N);
        records.for_each(|record| self.0.extend(record.iter().flat_map(|number| number.to_le_bytes())));
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Takes values from the beginning of bytes.
#[derive(Debug)]
pub(super) struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    pub fn new(bytes: &'b [u8]) -> Self {
        Self(bytes)
    }

    /// Whether nothing is left.
    pub fn is_at_end(&self) -> bool {
        self.0.is_empty()
    }

    fn take(&mut self, bytes: u64) -> Option<&'b [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(bytes).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    pub fn number(&mut self) -> Option<u64> {
        let (number, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*number))
    }

    /// A number that must be one of 32 bits.
    pub fn id(&mut self) -> Option<u32> {
        self.number()?.try_into().ok()
    }

    pub fn flag(&mut self) -> Option<bool> {
        match self.take(1)? {
            [0] => Some(false),
            [1] => Some(true),
            _ => None,
        }
    }

    pub fn text(&mut self) -> Option<&'b str> {
        let bytes = self.number()?;
        std::str::from_utf8(self.take(bytes)?).ok()
    }

    pub fn records<const N: usize>(
        &mut self,
    ) -> Option<impl ExactSizeIterator<Item = [u32; N]> + Clone + Send + Sync + use<'b, N>> {
        let size = 4 * N;
        let bytes = self.number()?.checked_mul(size as u64)?;
        Some(self.take(bytes)?.chunks_exact(size).map(|record| {
            let mut numbers = [0; N];
            for (number, bytes) in numbers.iter_mut().zip(record.as_chunks().0) {
                *number = u32::from_le_bytes(*bytes);
            }
            numbers
        }))
    }
}
