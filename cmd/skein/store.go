package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

type storeCmd struct {
	Etcdctl etcdctlCmd `cmd:"" help:"Write an administrator's certificates for the store into DIR and print the settings of etcdctl for a shell: eval \"$(skein store etcdctl DIR)\"."`
}

type etcdctlCmd struct {
	targetFlag
	Dir   string `arg:"" help:"Directory for ca.crt, client.crt and client.key (0600); made if it does not exist." type:"path"`
	Shard string `help:"Shard to talk to: system, pods (/registry/pods/) or events (/registry/events/, /registry/leases/)." default:"system"`
}

func (e *etcdctlCmd) Run(ctx context.Context) error {
	c, err := e.client()
	if err != nil {
		return err
	}
	a, err := c.EtcdAccess(ctx)
	if err != nil {
		return err
	}
	endpoints, ok := a.Endpoints[e.Shard]
	if !ok {
		return fmt.Errorf("there is no shard %q: the store has %s", e.Shard, strings.Join(slices.Sorted(maps.Keys(a.Endpoints)), ", "))
	}
	if err := os.MkdirAll(e.Dir, 0o700); err != nil {
		return err
	}
	env := []string{"ETCDCTL_ENDPOINTS=" + shellQuote(strings.Join(endpoints, ","))}
	for _, f := range []struct {
		name, variable string
		pem            []byte
	}{{"ca.crt", "ETCDCTL_CACERT", a.CA}, {"client.crt", "ETCDCTL_CERT", a.Cert}, {"client.key", "ETCDCTL_KEY", a.Key}} {
		path := filepath.Join(e.Dir, f.name)
		if err := writePrivate(path, f.pem); err != nil {
			return err
		}
		env = append(env, f.variable+"="+shellQuote(path))
	}
	for _, v := range env {
		fmt.Println("export " + v)
	}
	return nil
}

// writePrivate replaces a file; what was there may have been readable by others.
func writePrivate(path string, b []byte) error {
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

// shellQuote quotes one word for a POSIX shell.
func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
