package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"sort"
	"strings"

	"github.com/alecthomas/kong"
	"sigs.k8s.io/yaml"

	"skein.io/skein/gossip/identity"
)

const defaultConfigFile = "/etc/skein/config.yaml"

// configResolver reads the configuration file, whose keys are the long names of up's and join's flags. Flags and the
// environment win over it. A file that was named must exist; the default one may be missing.
func configResolver(args []string) (kong.Resolver, error) {
	path, named := os.LookupEnv("SKEIN_CONFIG")
	if !named {
		path = defaultConfigFile
	}
	for i, a := range args {
		if v, ok := strings.CutPrefix(a, "--config="); ok {
			path, named = v, true
		} else if a == "--config" && i+1 < len(args) {
			path, named = args[i+1], true
		}
		if a == "--" {
			break
		}
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	values := map[string]any{}
	if err := yaml.UnmarshalStrict(b, &values); err != nil {
		return nil, fmt.Errorf("configuration %s: %w", path, err)
	}
	return &fileResolver{path: path, values: flatten(values)}, nil
}

type fileResolver struct {
	path   string
	values map[string]any
}

// Validate refuses keys that are no flag of the node, all of them at once.
func (r *fileResolver) Validate(app *kong.Application) error {
	known := map[string]bool{}
	for _, c := range app.Children {
		if c.Name == "up" || c.Name == "join" {
			for _, f := range c.Flags {
				known[f.Name] = true
			}
		}
	}
	var bad []string
	for k := range r.values {
		if !known[k] {
			bad = append(bad, k)
		}
	}
	if len(bad) == 0 {
		return nil
	}
	sort.Strings(bad)
	return fmt.Errorf("configuration %s: unknown key %s (keys are the long flags of 'skein up')", r.path, strings.Join(bad, ", "))
}

// flatten turns a mapping, as backup: {dir: D}, into the flags that it stands for: backup-dir. The one flag that takes a mapping is label.
func flatten(values map[string]any) map[string]any {
	out := map[string]any{}
	for k, v := range values {
		m, ok := v.(map[string]any)
		if !ok || k == "label" {
			out[k] = v
			continue
		}
		for sub, x := range m {
			out[k+"-"+sub] = x
		}
	}
	return out
}

// Resolve gives kong the file's value of a flag of a command that starts or prepares the node; of other commands only where the local node is. Kong would let the
// file win over the environment.
func (r *fileResolver) Resolve(_ *kong.Context, parent *kong.Path, flag *kong.Flag) (any, error) {
	if parent.Command == nil || !slices.Contains([]string{"up", "join", "restore", "recover"}, parent.Command.Name) && flag.Name != "state-dir" && flag.Name != "cri-endpoint" {
		return nil, nil
	}
	for _, env := range flag.Envs {
		if _, ok := os.LookupEnv(env); ok {
			return nil, nil
		}
	}
	v, ok := r.values[flag.Name]
	if !ok {
		return nil, nil
	}
	return v, nil
}

// defaultName is the machine's host name as a node name.
func defaultName() string {
	h, err := os.Hostname()
	if err != nil || h == "" {
		return "node"
	}
	return identity.DefaultName(h)
}

// defaultAddress is the address that the machine would use towards the outside: no packet is sent to find it.
func defaultAddress() (netip.Addr, error) {
	ifs, err := net.InterfaceAddrs()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("addresses of this machine: %w", err)
	}
	if c, err := net.Dial("udp4", "192.0.2.1:9"); err == nil { // TEST-NET-1, RFC 5737: only the route is looked up
		defer c.Close()
		if a, ok := c.LocalAddr().(*net.UDPAddr); ok && !a.IP.IsLoopback() {
			return a.AddrPort().Addr().Unmap(), nil
		}
	}
	for _, a := range ifs {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && n.IP.IsGlobalUnicast() {
			ip, _ := netip.AddrFromSlice(n.IP.To4())
			return ip, nil
		}
	}
	return netip.Addr{}, errors.New("this machine has no IPv4 address that other nodes could reach: name one with --address")
}
