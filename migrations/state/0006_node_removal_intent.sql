-- Since when a VM is to be removed, whatever becomes of whoever was to do it; NULL: it is not.
ALTER TABLE vm_nodes ADD COLUMN removal_wanted_at TEXT;
