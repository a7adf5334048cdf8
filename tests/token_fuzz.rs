//! The fuzz target's check on a fixed number of inputs; `docs/fuzzing.md` tells how to let it run for longer.

#[path = "common/random.rs"]
mod random;
#[path = "common/token_differential.rs"]
mod token_differential;

use random::Random;

/// Inputs, in debug builds some seconds' work.
const INPUTS: usize = 6000;

/// What texts are put together of, beside single characters of all of Unicode.
const PIECES: [&str; 48] = [
    " ",
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\u{a0}",
    "\u{3000}",
    "\u{85}",
    "\u{0}",
    "\u{200d}",
    "\u{fffd}",
    "\u{301}",
    "\u{302e}\u{1d165}",
    "the",
    "The",
    "cat",
    "Cat",
    "sat",
    "mat",
    "café",
    "é!",
    "É!",
    "e\u{301}!",
    "中",
    "中文",
    "各",
    "한",
    "\u{1100}\u{1161}",
    "👩\u{200d}👧",
    "<a>",
    "<A>",
    "[b]",
    "[B]",
    "x y",
    "x  y",
    "<s>",
    "</s>",
    "<s>x",
    "][",
    "[MASK]",
    "<mask>",
    "<unk>",
    "'s",
    "'ll",
    "1½",
    "\u{2581}",
    "ﬁ",
];

fn input(random: &mut Random) -> Vec<u8> {
    let mut input = vec![random.next() as u8, random.next() as u8];
    for _ in 0..random.below(14) {
        match random.below(6) {
            0 => input.extend(char::from_u32(random.below(0x11_0000) as u32).map(String::from).unwrap_or_default().bytes()),
            1 => input.extend(char::from_u32(random.below(0x3100) as u32).map(String::from).unwrap_or_default().bytes()),
            2 => input.push(random.next() as u8),
            _ => input.extend(PIECES[random.below(PIECES.len())].bytes()),
        }
    }
    input
}

#[test]
fn random_inputs_get_the_library_s_ids() {
    let pairs = token_differential::pairs();
    let mut random = Random(15);
    for _ in 0..INPUTS {
        token_differential::check(&pairs, &input(&mut random));
    }
}
