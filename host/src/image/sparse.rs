//! Where the pieces of a sparse file lie: the four ways in which GNU tar writes that down.
//!
//! | form | the map |
//! |---|---|
//! | old GNU | in the header, four pieces, and 21 in each block that follows it |
//! | PAX 0.0 | records `GNU.sparse.offset` and `GNU.sparse.numbytes`, one pair for each piece |
//! | PAX 0.1 | one record `GNU.sparse.map`: numbers with commas |
//! | PAX 1.0 | decimal lines before the content, padded to a block: how many, then the pairs |
//!
//! Nothing here reads a stream. A map that makes no sense is an error in a few words, and one that is
//! too long is cut short before it is held.

use super::fields::{decimal, number};

/// The pieces of a sparse file.
pub(super) const MAX_RUNS: usize = 65_536;

/// A piece: its offset in the file, and its length.
pub(super) type Run = (u64, u64);

type Records = [(Vec<u8>, Vec<u8>)];

/// Why there is no map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// It makes no sense.
    Damaged(&'static str),
    /// It has more than [`MAX_RUNS`] pieces.
    TooLong,
}

/// What the records of a PAX header say about a sparse file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// All of it.
    Listed { size: u64, runs: Vec<Run> },
    /// Its size; the map comes before the content.
    InContent { size: u64 },
}

/// The name of a sparse file, where the header has a made-up one.
pub(super) const NAME: &[u8] = b"GNU.sparse.name";

const NO_NUMBER: Fault = Fault::Damaged("a number in the map of a sparse file is none");

fn value<'r>(records: &'r Records, key: &[u8]) -> Option<&'r [u8]> {
    let found = records.iter().rev().find(|(name, _)| name == key);
    found.map(|(_, value)| value.as_slice()).filter(|value| !value.is_empty())
}

fn unsigned(text: &[u8]) -> Result<u64, Fault> {
    decimal(text).and_then(|value| u64::try_from(value).ok()).ok_or(NO_NUMBER)
}

/// The form of a file; `None` if it is not sparse, as far as PAX says.
pub(super) fn form(records: &Records) -> Result<Option<Form>, Fault> {
    if !records.iter().any(|(key, _)| key.starts_with(b"GNU.sparse.")) {
        return Ok(None);
    }
    let size = value(records, b"GNU.sparse.realsize").or(value(records, b"GNU.sparse.size"));
    let size = unsigned(size.ok_or(Fault::Damaged("a sparse file has no size"))?)?;
    match value(records, b"GNU.sparse.major") {
        Some(b"1") => return Ok(Some(Form::InContent { size })),
        Some(b"0") | None => {}
        Some(_) => return Err(Fault::Damaged("a sparse file is of an unknown version")),
    }
    let mut numbers = Vec::new();
    if let Some(map) = value(records, b"GNU.sparse.map") {
        for text in map.split(|byte| *byte == b',') {
            numbers.push(unsigned(text)?);
        }
    } else {
        for (key, text) in records {
            let place = match key.as_slice() {
                b"GNU.sparse.offset" => 0,
                b"GNU.sparse.numbytes" => 1,
                _ => continue,
            };
            if numbers.len() % 2 != place {
                return Err(Fault::Damaged("the map of a sparse file has halves of pieces"));
            }
            numbers.push(unsigned(text)?);
        }
    }
    Ok(Some(Form::Listed { size, runs: pairs(&numbers)? }))
}

fn pairs(numbers: &[u64]) -> Result<Vec<Run>, Fault> {
    let (pairs, rest) = numbers.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(Fault::Damaged("the map of a sparse file has halves of pieces"));
    }
    if pairs.len() > MAX_RUNS {
        return Err(Fault::TooLong);
    }
    Ok(pairs.iter().map(|[offset, length]| (*offset, *length)).collect())
}

/// The pieces in a part of an old GNU header or of a block after it; a blank one ends them.
pub(super) fn old_pieces(map: &[u8]) -> Result<Vec<Run>, Fault> {
    let field = |field| number(field).and_then(|value| u64::try_from(value).ok()).ok_or(NO_NUMBER);
    let pieces = map.chunks_exact(24).take_while(|piece| piece[0] != 0);
    pieces.map(|piece| Ok((field(&piece[..12])?, field(&piece[12..])?))).collect()
}

/// Reads the map of a PAX 1.0 file, block by block.
#[derive(Debug, Default)]
pub(super) struct MapReader {
    /// How many numbers there will be, once that is known.
    wanted: Option<usize>,
    numbers: Vec<u64>,
    /// The number that is being read.
    digits: Option<u64>,
}

impl MapReader {
    /// Takes a block; answers the pieces once it was the last. What follows in it is padding.
    pub(super) fn block(&mut self, block: &[u8]) -> Result<Option<Vec<Run>>, Fault> {
        for byte in block {
            match byte {
                b'0'..=b'9' => {
                    let digit = u64::from(byte - b'0');
                    let before = self.digits.unwrap_or(0);
                    // Below 2^63, so that sums of two are no problem.
                    let number = before.checked_mul(10).and_then(|tens| tens.checked_add(digit));
                    self.digits = Some(number.filter(|n| *n <= i64::MAX as u64).ok_or(NO_NUMBER)?);
                }
                b'\n' => {
                    let number = self.digits.take().ok_or(NO_NUMBER)?;
                    self.number(number)?;
                    if self.wanted == Some(self.numbers.len()) {
                        return pairs(&self.numbers).map(Some);
                    }
                }
                _ => return Err(NO_NUMBER),
            }
        }
        Ok(None)
    }

    fn number(&mut self, number: u64) -> Result<(), Fault> {
        if self.wanted.is_some() {
            self.numbers.push(number);
            return Ok(());
        }
        let count = usize::try_from(number).ok().filter(|count| *count <= MAX_RUNS);
        self.wanted = Some(2 * count.ok_or(Fault::TooLong)?);
        Ok(())
    }
}

/// Checks that the pieces are in order, do not overlap, end within the file, and take what is stored.
pub(super) fn check(runs: &[Run], size: u64, stored: u64) -> Result<(), Fault> {
    let (mut end, mut sum) = (0, 0_u64);
    for (offset, length) in runs {
        if *offset < end {
            return Err(Fault::Damaged("the pieces of a sparse file overlap"));
        }
        // Each is below 2^63.
        end = offset + length;
        sum = sum.saturating_add(*length);
    }
    if end > size || sum != stored {
        return Err(Fault::Damaged("the pieces of a sparse file contradict its size"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(list: &[(&str, &str)]) -> Vec<(Vec<u8>, Vec<u8>)> {
        list.iter()
            .map(|(key, value)| (key.as_bytes().to_vec(), value.as_bytes().to_vec()))
            .collect()
    }

    #[test]
    fn records_hold_maps() {
        let plain = records(&[("path", "x")]);
        assert_eq!(form(&plain), Ok(None));
        let zero = records(&[
            ("GNU.sparse.size", "50"),
            ("GNU.sparse.numblocks", "2"),
            ("GNU.sparse.offset", "0"),
            ("GNU.sparse.numbytes", "5"),
            ("GNU.sparse.offset", "20"),
            ("GNU.sparse.numbytes", "10"),
        ]);
        let listed = Form::Listed { size: 50, runs: vec![(0, 5), (20, 10)] };
        assert_eq!(form(&zero), Ok(Some(listed)));
        let one = records(&[("GNU.sparse.size", "9"), ("GNU.sparse.map", "1,2,4,5")]);
        assert_eq!(form(&one), Ok(Some(Form::Listed { size: 9, runs: vec![(1, 2), (4, 5)] })));
        let two = records(&[("GNU.sparse.major", "1"), ("GNU.sparse.realsize", "7")]);
        assert_eq!(form(&two), Ok(Some(Form::InContent { size: 7 })));
        for bad in [
            records(&[("GNU.sparse.map", "1,2")]),
            records(&[("GNU.sparse.size", "9"), ("GNU.sparse.map", "1,2,3")]),
            records(&[("GNU.sparse.size", "9"), ("GNU.sparse.map", "1,,2,3")]),
            records(&[("GNU.sparse.size", "-9"), ("GNU.sparse.map", "1,2")]),
            records(&[("GNU.sparse.size", "9"), ("GNU.sparse.numbytes", "1")]),
            records(&[("GNU.sparse.size", "9"), ("GNU.sparse.offset", "1")]),
            records(&[("GNU.sparse.size", "9"), ("GNU.sparse.major", "2")]),
        ] {
            assert!(matches!(form(&bad), Err(Fault::Damaged(_))), "{bad:?}");
        }
    }

    #[test]
    fn a_map_in_the_content_comes_in_pieces() {
        let mut reader = MapReader::default();
        assert_eq!(reader.block(b"2\n0\n51"), Ok(None));
        assert_eq!(reader.block(b"2\n1024\n512\n\0\0\0"), Ok(Some(vec![(0, 512), (1024, 512)])));
        assert_eq!(MapReader::default().block(b"0\n"), Ok(Some(vec![])));
        for bad in [&b"x\n"[..], b"\n", b"1\n-1\n", b"\0", b"1\n9223372036854775808\n"] {
            assert_eq!(MapReader::default().block(bad), Err(NO_NUMBER), "{}", bad.escape_ascii());
        }
        assert_eq!(MapReader::default().block(b"65537\n"), Err(Fault::TooLong));
    }

    #[test]
    fn pieces_must_agree_with_the_size() {
        assert_eq!(check(&[(0, 5), (5, 5)], 10, 10), Ok(()));
        assert_eq!(check(&[(2, 3), (10, 0)], 10, 3), Ok(()));
        for (runs, size, stored) in [
            (&[(0, 5), (4, 5)][..], 10, 10),
            (&[(0, 5)], 4, 5),
            (&[(0, 5)], 10, 4),
            (&[(8, 2), (0, 2)], 10, 4),
        ] {
            assert!(check(runs, size, stored).is_err(), "{runs:?}");
        }
    }
}
