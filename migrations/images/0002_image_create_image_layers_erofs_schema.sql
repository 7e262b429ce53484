-- The filesystems that an image is made of, and how many images share each.
CREATE TABLE image_layers (
    scope TEXT NOT NULL,
    tag TEXT NOT NULL,
    ordinal INTEGER NOT NULL,
    digest TEXT NOT NULL,
    fs_type TEXT NOT NULL DEFAULT 'erofs',
    size INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (scope, tag, ordinal)
);
CREATE INDEX idx_image_layers_ref ON image_layers (scope, tag);
CREATE INDEX idx_image_layers_digest ON image_layers (digest);
CREATE INDEX idx_image_layers_digest_fs ON image_layers (digest, fs_type);

CREATE TABLE layer_refs (
    digest TEXT NOT NULL,
    fs_type TEXT NOT NULL DEFAULT 'erofs',
    ref_count INTEGER NOT NULL DEFAULT 0,
    size INTEGER NOT NULL DEFAULT 0,
    updated_at TEXT NOT NULL,
    PRIMARY KEY (digest, fs_type)
);
CREATE INDEX idx_layer_refs_count ON layer_refs (ref_count);

-- Only images whose layers are known as EROFS can be run.
DELETE FROM image_layers WHERE fs_type <> 'erofs';
DELETE FROM images
WHERE NOT EXISTS (
    SELECT 1 FROM image_layers AS l WHERE l.scope = images.scope AND l.tag = images.tag
);
INSERT INTO layer_refs (digest, fs_type, ref_count, size, updated_at)
SELECT digest, fs_type, count(*), max(size), strftime('%Y-%m-%dT%H:%M:%SZ', 'now')
FROM image_layers
GROUP BY digest, fs_type;
