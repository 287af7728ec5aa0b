package cri

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// cniVersion of the specification that configuration and plugin speak.
const cniVersion = "1.0.0"

// WriteCNI puts the network of the pods into dir (Containerd.CNIDir): one plugin, HelperName, with its own keys in conf. The network's
// name is skein-<node>, as the runtime's library keeps results by that name in a directory that nodes on one machine
// may share. containerd sees the file at once, and its network becomes ready.
func WriteCNI(dir, node string, conf any) error {
	raw, err := json.Marshal(conf)
	if err != nil {
		return fmt.Errorf("network configuration: %w", err)
	}
	plugin := map[string]json.RawMessage{}
	if err := json.Unmarshal(raw, &plugin); err != nil {
		return fmt.Errorf("network configuration: %w", err)
	}
	plugin["type"] = json.RawMessage(`"` + HelperName + `"`)
	delete(plugin, "name") // the library sets these two for each plugin
	delete(plugin, "cniVersion")
	b, err := json.MarshalIndent(map[string]any{"cniVersion": cniVersion, "name": "skein-" + node, "plugins": []any{plugin}}, "", "  ")
	if err != nil {
		return fmt.Errorf("network configuration: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("network configuration: %w", err)
	}
	if err := writeFile(filepath.Join(dir, "10-skein.conflist"), append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("network configuration: %w", err)
	}
	return nil
}
