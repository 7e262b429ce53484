//! Files of a guest, as they are read, written and listed from outside.

/// The longest path, in bytes: Linux takes no longer one.
pub const MAX_PATH_BYTES: usize = 4095;

/// What to do with a file of a guest, as root and outside of any command's view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileOp {
    /// Read a regular file. Its bytes are what the operation prints.
    Read {
        /// Its path, absolute.
        path: String,
        /// Where to begin.
        offset: u64,
        /// How much at most; `None` means up to its end.
        length: Option<u64>,
    },
    /// Write a regular file, from the operation's stdin. Missing directories are made.
    Write {
        /// Its path, absolute.
        path: String,
        /// Where to begin; the rest stays as it is. `None` replaces the file's contents.
        offset: Option<u64>,
        /// The permissions of a file that is made.
        mode: u32,
    },
    /// List a directory, one level. The operation prints its entries, see
    /// `host::guest_link::FileEntries`.
    List {
        /// Its path, absolute.
        path: String,
    },
}

/// Why a path is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("path {path:?}: {expected}")]
pub struct InvalidPath {
    path: String,
    expected: &'static str,
}

impl FileOp {
    /// The path that is meant.
    #[must_use]
    pub fn path(&self) -> &str {
        match self {
            Self::Read { path, .. } | Self::Write { path, .. } | Self::List { path } => path,
        }
    }

    /// Checks the path.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(self) -> Result<Self, InvalidPath> {
        let path = self.path();
        let refused = |expected| {
            let path = path.chars().take(100).collect();
            Err(InvalidPath { path, expected })
        };
        match path {
            "" => refused("give a path in the guest"),
            path if !path.starts_with('/') => refused("use an absolute path"),
            path if path.contains('\0') => refused("it holds a NUL"),
            path if path.len() > MAX_PATH_BYTES => refused("it is too long"),
            _ => Ok(self),
        }
    }
}

/// An entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileEntry {
    /// Its name; any bytes but `/` and NUL.
    pub name: Vec<u8>,
    /// Its size in bytes.
    pub size: u64,
    /// Its type and permissions, as `st_mode` has them.
    pub mode: u32,
    /// When its contents were changed last, in seconds since 1970.
    pub modified_unix_s: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_absolute_and_can_be_paths() {
        let check = |path: &str| FileOp::List { path: path.into() }.check();
        check("/").unwrap();
        check("/a b/ü").unwrap();
        for bad in ["", "a", "./a", "/a\0b", &format!("/{}", "x".repeat(MAX_PATH_BYTES))] {
            check(bad).unwrap_err();
        }
    }
}
