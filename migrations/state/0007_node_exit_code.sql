-- How the VM's own command ended, as a shell says it; NULL: it has not, or nobody knows.
ALTER TABLE vm_nodes ADD COLUMN exit_code INTEGER;
