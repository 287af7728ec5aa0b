package cri

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// WriteCNI puts a CNI network configuration list (datapath/podnet renders it, with HelperName as the plugin) into dir
// (Containerd.CNIDir), in place of an earlier one. containerd sees the file at once, and its network becomes ready.
func WriteCNI(dir string, conflist []byte) error {
	if !json.Valid(conflist) {
		return fmt.Errorf("network configuration for %s is not JSON: %.80q", dir, conflist)
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return fmt.Errorf("network configuration: %w", err)
	}
	if err := writeFile(filepath.Join(dir, "10-skein.conflist"), conflist, 0o644); err != nil {
		return fmt.Errorf("network configuration: %w", err)
	}
	return nil
}
