package cri

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/template"

	"skein.io/skein/node/cri/exits"
	"skein.io/skein/node/cri/image"
)

// renderConfig gives containerd's configuration file (version 4). Pure: the same input gives the same bytes, which is how a
// changed configuration is noticed.
func (c Config) renderConfig(oomAllowed bool) ([]byte, error) {
	var b bytes.Buffer
	p := c.paths()
	err := configTemplate.Execute(&b, map[string]any{
		"Root": p.dir + "/root", "State": p.dir + "/state", "Address": p.address, "ShimSockets": p.shimSockets,
		"LogLevel": c.LogLevel, "Env": exits.DirEnv + "=" + p.exits, "Pause": image.PauseName, "BinDir": p.bin,
		"Runc": c.Runc, "RuncRoot": p.dir + "/runc",
		"ShimCgroup": NewCgroups(c.CgroupRoot).Shims, "CNIDir": c.CNIDir, "Registries": c.registryDir(), "RestrictOOM": !oomAllowed,
	})
	if err != nil {
		return nil, fmt.Errorf("containerd configuration: %w", err)
	}
	return b.Bytes(), nil
}

// registryDir is where containerd looks up how to reach a registry.
func (c Config) registryDir() string {
	switch {
	case c.Registries.own():
		return filepath.Join(c.Dir, "registries")
	case c.Registries.Dir != "":
		return c.Registries.Dir
	}
	return defaultRegistryDir
}

// capSysResource is the bit of the capability that lets a process lower an oom_score_adj (linux/capability.h).
const capSysResource = 24

// canLowerOOMScore tells whether a process with this /proc/self/status may give its children a better score than it has itself.
func canLowerOOMScore(status string) bool {
	for _, l := range strings.Split(status, "\n") {
		if v, ok := strings.CutPrefix(l, "CapEff:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(v), 16, 64)
			return err == nil && n>>capSysResource&1 == 1
		}
	}
	return false
}

func oomScoreAllowed() bool {
	b, err := os.ReadFile("/proc/self/status")
	return err == nil && canLowerOOMScore(string(b))
}

var configTemplate = template.Must(template.New("config").Funcs(template.FuncMap{"q": strconv.Quote}).Parse(
	`# Written by skein at each start: changes are lost.
version = 4
root = {{q .Root}}
state = {{q .State}}
# The default would read /etc/containerd/conf.d.
imports = []
# Else containerd starts without CRI when that fails.
required_plugins = ["io.containerd.grpc.v1.cri"]
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt",
  "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.erofs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.native",
  "io.containerd.differ.v1.erofs", "io.containerd.mount-handler.v1.erofs", "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing", "io.containerd.image-verifier.v1.bindir", "io.containerd.monitor.container.v1.restart"]
[debug]
level = {{q .LogLevel}}
[plugins."io.containerd.server.v1.grpc"]
address = {{q .Address}}
[plugins."io.containerd.server.v1.ttrpc"]
address = {{q (print .Address ".ttrpc")}}
[plugins."io.containerd.shim.v1.manager"]
socket_dir = {{q .ShimSockets}}
env = [{{q .Env}}]
[plugins."io.containerd.grpc.v1.cri"]
# Exec, attach and port-forward streams carry no credentials of their own: only the agent on this node reaches them.
stream_server_address = "127.0.0.1"
stream_server_port = "0"
[plugins."io.containerd.cri.v1.images".registry]
# One directory: of several, as in the default, the transfer service would make one name.
config_path = {{q .Registries}}
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = {{q .Pause}}
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = {{.RestrictOOM}}
netns_mounts_under_state_dir = true
# The default of 1 s costs a pod a quarter of a percent of a core, asleep.
stats_collect_period = "10s"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = {{q .Runc}}
Root = {{q .RuncRoot}}
ShimCgroup = {{q .ShimCgroup}}
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = [{{q .BinDir}}]
conf_dir = {{q .CNIDir}}
# Else it wants an executable named loopback.
use_internal_loopback = true
`))
