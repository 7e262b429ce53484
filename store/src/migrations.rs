//! The migrations of both databases, in the order in which they are applied.
//!
//! # Invariants
//! * A text that has been committed never changes; `migrations/SHA256SUMS` and a test see to it,
//!   and each database remembers the checksums of what was applied to it.
//! * Versions of one module go up by one. The modules `state`, `lifecycle` and `image` belong to
//!   the reference; what we add is in `node`, so that its next release cannot collide with ours.

use sha2::{Digest as _, Sha256};

/// One step of a schema.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Migration {
    pub(crate) module: &'static str,
    pub(crate) version: i64,
    pub(crate) name: &'static str,
    pub(crate) sql: &'static str,
}

impl Migration {
    /// The SHA-256 of its text.
    pub(crate) fn checksum(&self) -> String {
        hex::encode(Sha256::digest(self.sql.as_bytes()))
    }
}

macro_rules! migration {
    ($module:literal, $version:literal, $name:literal, $file:literal) => {
        Migration {
            module: $module,
            version: $version,
            name: $name,
            sql: include_str!(concat!("../../migrations/", $file)),
        }
    };
}

/// The migrations of `state.db`.
pub(crate) const STATE: &[Migration] = &[
    migration!("state", 1, "create_vms", "state/0001_state_create_vms.sql"),
    migration!(
        "state",
        2,
        "create_subnet_allocations",
        "state/0002_state_create_subnet_allocations.sql"
    ),
    migration!(
        "lifecycle",
        1,
        "create_append_only_vm_lifecycle_table",
        "state/0003_lifecycle_create_append_only_vm_lifecycle_table.sql"
    ),
    migration!(
        "lifecycle",
        2,
        "create_vm_lifecycle_head",
        "state/0004_lifecycle_create_vm_lifecycle_head.sql"
    ),
    migration!("node", 1, "owners_and_foreign_keys", "state/0005_node_owners_and_foreign_keys.sql"),
    migration!("node", 2, "removal_intent", "state/0006_node_removal_intent.sql"),
    migration!("node", 3, "exit_code", "state/0007_node_exit_code.sql"),
];

/// The migrations of `metadata.db`.
pub(crate) const IMAGES: &[Migration] = &[
    migration!("image", 1, "create_images", "images/0001_image_create_images.sql"),
    migration!(
        "image",
        2,
        "create_image_layers_erofs_schema",
        "images/0002_image_create_image_layers_erofs_schema.sql"
    ),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;

    #[test]
    fn committed_texts_do_not_change_and_all_of_them_are_applied() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../migrations");
        let sums = std::fs::read_to_string(dir.join("SHA256SUMS")).unwrap();
        let mut files: Vec<String> = ["state", "images"]
            .iter()
            .flat_map(|sub| std::fs::read_dir(dir.join(sub)).unwrap())
            .map(|entry| entry.unwrap().path())
            .map(|path| path.strip_prefix(&dir).unwrap().display().to_string())
            .collect();
        files.sort_by_key(|file| (file.starts_with("images"), file.clone()));
        let known: Vec<_> = STATE.iter().chain(IMAGES).collect();
        assert_eq!(files.len(), known.len(), "a file is not in the list: {files:?}");
        let expected: String = files
            .iter()
            .zip(known)
            .map(|(file, m)| {
                assert!(file.ends_with(&format!("_{}_{}.sql", m.module, m.name)), "{file}");
                format!("{}  {file}\n", m.checksum())
            })
            .collect();
        assert_eq!(sums, expected);
    }

    #[test]
    fn versions_of_a_module_have_no_gaps() {
        for list in [STATE, IMAGES] {
            let mut last = BTreeMap::new();
            for m in list {
                let before = last.insert(m.module, m.version).unwrap_or(0);
                assert_eq!(m.version, before + 1, "{}", m.module);
            }
        }
    }
}
