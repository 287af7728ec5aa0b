package cri

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// conflistName is the file of Skein's network in a directory of CNI configurations, of which a runtime takes the first by name.
const conflistName = "10-skein.conflist"

// WriteCNI puts a CNI network configuration list (datapath/podnet renders it, with HelperName as the plugin) into dir
// (Containerd.CNIDir), in place of an earlier one. containerd sees the file at once, and its network becomes ready.
func WriteCNI(dir string, conflist []byte) error {
	if !json.Valid(conflist) {
		return fmt.Errorf("network configuration for %s is not JSON: %.80q", dir, conflist)
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return fmt.Errorf("network configuration: %w", err)
	}
	path := filepath.Join(dir, conflistName)
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, conflist) {
		return nil // the runtime would load it again
	}
	if err := writeFile(path, conflist, 0o644); err != nil {
		return fmt.Errorf("network configuration: %w", err)
	}
	return nil
}
