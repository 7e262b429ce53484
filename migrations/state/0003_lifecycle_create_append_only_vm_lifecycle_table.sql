-- What happened to each VM; rows are added, never changed.
CREATE TABLE vm_lifecycle (
    vm_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    backend TEXT NOT NULL DEFAULT '',
    phase TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    last_error TEXT NOT NULL DEFAULT '',
    resources_json TEXT NOT NULL DEFAULT '{}',
    cleanup_json TEXT NOT NULL DEFAULT '{}',
    PRIMARY KEY (vm_id, version)
);
CREATE INDEX idx_vm_lifecycle_phase ON vm_lifecycle (phase);
CREATE INDEX idx_vm_lifecycle_vm_version ON vm_lifecycle (vm_id, version DESC);
