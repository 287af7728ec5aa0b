package cri

import "path/filepath"

// EndpointIn is the CRI endpoint of the containerd that the daemon with this state directory runs.
func EndpointIn(stateDir string) string {
	return "unix://" + Config{Dir: DirIn(stateDir)}.paths().address
}

// DirIn is where that daemon keeps its containerd (Config.Dir).
func DirIn(stateDir string) string { return filepath.Join(stateDir, "containerd") }
