-- One row per VM that is known on this host.
CREATE TABLE vms (
    id TEXT PRIMARY KEY,
    pid INTEGER NOT NULL DEFAULT 0,
    status TEXT NOT NULL,
    image TEXT NOT NULL DEFAULT '',
    config_json BLOB,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
);
CREATE INDEX idx_vms_status ON vms (status);
CREATE INDEX idx_vms_created_at ON vms (created_at);
