-- The number of the latest row of vm_lifecycle, per VM.
CREATE TABLE vm_lifecycle_head (
    vm_id TEXT PRIMARY KEY,
    last_version INTEGER NOT NULL
);
INSERT INTO vm_lifecycle_head (vm_id, last_version)
SELECT vm_id, max(version) FROM vm_lifecycle GROUP BY vm_id;
