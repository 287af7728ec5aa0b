package daemon

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	mathrand "math/rand"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"skein.io/skein/consensus/backup"
	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/keyring"
	"skein.io/skein/consensus/mvcc"
	"skein.io/skein/consensus/shard"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/node/join"
)

// source of a shard's section.
type source struct{ *mvcc.Image }

func (s source) WriteTo(w io.Writer) (int64, error) { return s.Write(w, nil) }

// clusterBackup is a backup of a cluster of one node, "old", with 200 objects in each shard.
func clusterBackup(t *testing.T) (file string) {
	t.Helper()
	now := time.Now()
	ca, err := identity.NewAuthority("0b0c2a2e-7a52-4a35-9c1d-2f1f0b6d1c55", now, rand.Reader)
	must(t, err)
	sa, err := identity.NewKey()
	must(t, err)
	ring, err := keyring.New(rand.Reader, now)
	must(t, err)
	secret, err := clusterKeys{authority: ca, sa: sa}.seal(ring)
	must(t, err)
	box, err := backup.Seal(ring.Encode(), nil)
	must(t, err)
	h := backup.Header{Cluster: identity.CAClusterID(ca.Cert), Created: now, Node: "old", Version: "v0", Settings: identity.DefaultCluster()}
	var sources []backup.Source
	for _, s := range shard.Default().Shards() {
		m := mvcc.New(mvcc.Config{Dir: filepath.Join(t.TempDir(), s.Name)})
		_, err := m.Open(nil)
		must(t, err)
		defer m.Close()
		puts := map[string][]byte{}
		if s.ID == shard.System {
			puts[keysKey], puts[join.ClaimPrefix+"old"] = secret, []byte("{}")
		}
		for i := range 200 {
			puts[objectKey(s, i)] = bytes.Repeat([]byte{byte(i)}, 1000)
		}
		m.Edit(nil, puts)
		i, err := m.Pin()
		must(t, err)
		defer i.Close()
		h.Shards = append(h.Shards, backup.Shard{ID: uint64(s.ID), Name: s.Name, Prefixes: s.Prefixes, Revision: i.Revision, Index: i.Index, Size: i.Size()})
		sources = append(sources, source{i})
	}
	var b bytes.Buffer
	must(t, backup.Write(&b, h, box, sources))
	file = filepath.Join(t.TempDir(), "all.skb")
	must(t, os.WriteFile(file, b.Bytes(), 0o600))
	return file
}

func objectKey(s shard.Shard, i int) string {
	prefix := "/registry/configmaps/"
	if len(s.Prefixes) > 0 {
		prefix = s.Prefixes[0]
	}
	return prefix + "default/" + strings.Repeat("x", i%7) + string(rune('a'+i%26)) + string(rune('a'+i/26))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func restoreConfig(dir string) Config {
	return Config{Name: "new", Address: netip.MustParseAddr("192.0.2.1"), StateDir: dir}
}

// whole checks that a state directory holds all that was restored: an identity that proves itself, the keys, and every object of
// every shard.
func whole(t *testing.T, dir string) {
	t.Helper()
	id, err := identity.Load(filepath.Join(dir, "identity"))
	must(t, err)
	if id.Name != "new" {
		t.Errorf("the identity is of %q", id.Name)
	}
	b, err := os.ReadFile(ringFile(dir))
	must(t, err)
	ring, err := keyring.Decode(b)
	must(t, err)
	for _, s := range shard.Default().Shards() {
		m := mvcc.New(mvcc.Config{Dir: host.RebuildDir(filepath.Join(dir, "raft"), s.ID)})
		_, err := m.Open(nil)
		must(t, err)
		for i := range 200 {
			r, err := m.Range(context.Background(), &pb.RangeRequest{Key: []byte(objectKey(s, i))})
			must(t, err)
			if len(r.Kvs) != 1 || len(r.Kvs[0].Value) != 1000 {
				t.Fatalf("shard %s lacks object %d", s.Name, i)
			}
		}
		if s.ID == shard.System {
			keys, err := storedKeys(context.Background(), m, ring)
			must(t, err)
			if identity.CAClusterID(keys.authority.Cert) != id.ClusterID {
				t.Error("the keys are of another cluster")
			}
		}
		must(t, m.Close())
	}
}

// TestRestoreProcess is no test: it is the process that TestRestoreKilled kills.
func TestRestoreProcess(t *testing.T) {
	file := os.Getenv("SKEIN_RESTORE_FILE")
	if file == "" {
		t.Skip("started by TestRestoreKilled")
	}
	_, err := Restore(context.Background(), restoreConfig(os.Getenv("SKEIN_RESTORE_DIR")), file, nil)
	must(t, err)
}

// A restore that is killed at any moment leaves nothing, all of it, or what says that it was interrupted and nothing starts on;
// restoring again makes that whole.
func TestRestoreKilled(t *testing.T) {
	t.Parallel()
	file := clusterBackup(t)
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	rnd := mathrand.New(mathrand.NewSource(seed))
	start := func(dir string) *exec.Cmd {
		c := exec.Command(os.Args[0], "-test.run=^TestRestoreProcess$")
		c.Env = append(os.Environ(), "SKEIN_RESTORE_FILE="+file, "SKEIN_RESTORE_DIR="+dir)
		return c
	}
	dir := filepath.Join(t.TempDir(), "calm")
	begin := time.Now()
	if out, err := start(dir).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	took := time.Since(begin)
	whole(t, dir)
	_, err := Restore(t.Context(), restoreConfig(dir), file, nil)
	if err == nil || !strings.Contains(err.Error(), "holds the state of node new") {
		t.Errorf("a restore over a state: %v", err)
	}
	found := map[string]int{}
	kills := 3
	if os.Getenv("SKEIN_LONG") != "" {
		kills = 30
	}
	for range kills {
		dir := filepath.Join(t.TempDir(), "state")
		c := start(dir)
		must(t, c.Start())
		time.Sleep(time.Duration(rnd.Int63n(int64(took)))) // the moment of death
		must(t, c.Process.Kill())
		_ = c.Wait()
		found[settle(t, dir, file)]++
	}
	t.Logf("a restore takes %v; after %d kills: %v", took.Round(time.Millisecond), kills, found)
}

// settle looks at what a killed restore left, and restores again if it was not finished.
func settle(t *testing.T, dir, file string) string {
	t.Helper()
	interrupted := checkRestored(dir)
	switch {
	case interrupted == nil && checkNoState(dir) != nil:
		whole(t, dir)
		return "whole"
	case interrupted != nil && (!errors.Is(interrupted, errInterrupted) || !strings.Contains(interrupted.Error(), "skein restore")):
		t.Errorf("a start says %v", interrupted)
	}
	if _, err := Restore(t.Context(), restoreConfig(dir), file, nil); err != nil {
		t.Fatalf("the second restore: %v", err)
	}
	whole(t, dir)
	if interrupted != nil {
		return "interrupted"
	}
	return "nothing"
}

// The moments of the last, shortest part, one by one.
func TestRestoreCommit(t *testing.T) {
	t.Parallel()
	file := clusterBackup(t)
	parts := []string{"raft", "identity", filepath.Join("identity", keyring.FileName)}
	for done := range len(parts) + 1 {
		dir := filepath.Join(t.TempDir(), "state")
		_, err := Restore(t.Context(), restoreConfig(dir), file, nil)
		must(t, err)
		// As if the first of the parts alone had been moved.
		must(t, os.Mkdir(filepath.Join(dir, stagingDir), 0o700))
		for _, p := range parts[done:] {
			must(t, os.RemoveAll(filepath.Join(dir, p)))
		}
		if got := settle(t, dir, file); got != "interrupted" {
			t.Errorf("with %v in place: %s", parts[:done], got)
		}
	}
}
