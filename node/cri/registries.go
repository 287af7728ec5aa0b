package cri

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Registries says how images are pulled from registries that are not reached by https at their own name. The zero value leaves all to
// Dir.
type Registries struct {
	// Insecure are registries (HOST or HOST:PORT, as in image names) that speak plain http.
	Insecure []string
	// Mirrors has, for a registry, URLs (http or https) that are asked for its images before it, in order.
	Mirrors map[string][]string
	// Dir has containerd's own files, HOST_PORT_/hosts.toml, for all that the other two cannot say; it excludes them. containerd reads it at
	// each pull. Default: /etc/containerd/certs.d.
	Dir string
}

// defaultRegistryDir is where a containerd's configuration of registries is by convention.
const defaultRegistryDir = "/etc/containerd/certs.d"

// registryHost is what may stand before the first slash of an image's name.
var registryHost = regexp.MustCompile(`^([a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?$`)

func (r Registries) own() bool { return len(r.Insecure) > 0 || len(r.Mirrors) > 0 }

// Validate reports all faults at once.
func (r Registries) Validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	for _, h := range r.Insecure {
		if !registryHost.MatchString(h) {
			bad("insecure registry %q: want HOST or HOST:PORT", h)
		}
	}
	for h, urls := range r.Mirrors {
		if !registryHost.MatchString(h) {
			bad("mirrors of registry %q: want HOST or HOST:PORT", h)
		}
		if len(urls) == 0 {
			bad("registry %s: no mirror is named", h)
		}
		for _, s := range urls {
			if u, err := url.Parse(s); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
				bad("mirror %q of registry %s: want http://HOST[:PORT][/PATH] or https://...", s, h)
			}
		}
	}
	if r.Dir != "" && r.own() {
		bad("a directory of registries (%s) and single registries exclude each other: name those there", r.Dir)
	}
	if r.Dir != "" && (!filepath.IsAbs(r.Dir) || strings.ContainsAny(r.Dir, "\"\\\n:")) {
		bad("directory of registries %q: want an absolute path without quotes and colons", r.Dir)
	}
	return errors.Join(errs...)
}

// files are the contents of a directory that says it to containerd: pure.
func (r Registries) files() map[string]string {
	out := map[string]string{}
	for _, h := range slices.Concat(r.Insecure, keys(r.Mirrors)) {
		var b strings.Builder
		b.WriteString("# Written by skein at each start: changes are lost.\n")
		if slices.Contains(r.Insecure, h) {
			fmt.Fprintf(&b, "server = %q\n", "http://"+h)
		}
		for _, m := range r.Mirrors[h] {
			fmt.Fprintf(&b, "[host.%s]\ncapabilities = [\"pull\", \"resolve\"]\n", strconv.Quote(m))
		}
		out[filepath.Join(hostDir(h), "hosts.toml")] = b.String()
	}
	return out
}

func keys(m map[string][]string) (out []string) {
	for k := range m {
		out = append(out, k)
	}
	return out
}

// hostDir is containerd's name of a registry's directory: a colon may not be in it (hostDirectory in core/remotes/docker/config).
func hostDir(host string) string {
	if i := strings.LastIndexByte(host, ':'); i > 0 && !strings.HasSuffix(host, "]") {
		return host[:i] + "_" + host[i+1:] + "_"
	}
	return host
}

// write replaces a directory by these files. Nobody pulls yet, or what is pulled meanwhile is tried again.
func (r Registries) write(dir string) error {
	if err := os.RemoveAll(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("registries: %w", err)
	}
	for name, text := range r.files() {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			return fmt.Errorf("registries: %w", err)
		}
	}
	return nil
}
