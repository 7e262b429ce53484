//! What a sweep of the image store found.

use std::path::PathBuf;

use super::ImageError;

/// What kind of thing was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GarbageKind {
    /// The root filesystem of no image.
    Blob,
    /// The directory of an import that did not end.
    Temporary,
    /// What was downloaded and is of no image.
    Content,
}

impl GarbageKind {
    /// Its name for scripts.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Blob => "blob",
            Self::Temporary => "temporary",
            Self::Content => "content",
        }
    }
}

/// Something that nobody wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Garbage {
    /// What it is.
    pub kind: GarbageKind,
    /// Where it is, or was.
    pub path: PathBuf,
    /// The bytes that it takes on disk, where that is known.
    pub bytes: Option<u64>,
}

/// What a sweep found. What could not be looked at is an error here, and never counted as clean.
#[derive(Debug, Default)]
pub struct Garbages {
    /// Removed, or of a dry run: what would be removed.
    pub removed: Vec<Garbage>,
    /// Wanted by no image, but somebody uses it just now: it stays.
    pub in_use: Vec<Garbage>,
    /// What could not be looked at or removed; the rest was swept nevertheless.
    pub errors: Vec<ImageError>,
}

impl Garbages {
    /// Adds what another sweep found.
    pub fn add(&mut self, other: Self) {
        self.removed.extend(other.removed);
        self.in_use.extend(other.in_use);
        self.errors.extend(other.errors);
    }

    pub(super) fn failed(error: ImageError) -> Self {
        Self { errors: vec![error], ..Self::default() }
    }
}
