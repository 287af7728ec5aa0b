package daemon

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
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

// revisionBump is how far a replaced store moves its revisions on: more than any cluster writes between a backup and the end of it, as
// etcd's documentation advises for a restore (a billion is a thousand writes a second for eleven days).
const revisionBump = 1_000_000_000

// stagingDir is where a restore prepares the state. While it exists the state is not whole.
const stagingDir = "restore.tmp"

// stateOf are the parts of the state directory that belong to a cluster; images, which do not, may be there.
var stateOf = []string{"identity", "founding.json", "raft", "gossip", "desired.db"}

// errInterrupted says that the state directory is half of one.
var errInterrupted = errors.New("a restore was interrupted here: run 'skein restore' again, or remove the directory to do without it")

// checkRestored refuses a state that a restore has not finished.
func checkRestored(stateDir string) error {
	if _, err := os.Stat(filepath.Join(stateDir, stagingDir)); err == nil {
		return fmt.Errorf("%s: %w", filepath.Join(stateDir, stagingDir), errInterrupted)
	}
	return nil
}

// Restored says what Restore made.
type Restored struct {
	BackupInfo
	// Node is the name of this node, the first of the restored cluster.
	Node string
	// Forgotten are the names of the old cluster's nodes.
	Forgotten []string
	// Number of the new generation.
	Number uint64
}

// Restore prepares the state of a node that was never part of a cluster, so that its next start goes on with the cluster of a backup:
// with all objects, the same CA and ServiceAccount key, and this node as its only member. Nothing of the state directory is touched
// before the whole backup has proven right.
func Restore(ctx context.Context, cfg Config, path string, passphrase []byte) (r Restored, err error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return r, fmt.Errorf("restore:\n%w", err)
	}
	in := os.Stdin
	if path != "-" {
		if in, err = os.Open(path); err != nil {
			return r, fmt.Errorf("restore: %w", err)
		}
		defer in.Close()
	}
	if err := os.MkdirAll(cfg.StateDir, 0o755); err != nil {
		return r, fmt.Errorf("state directory: %w", err)
	}
	unlock, err := lockState(cfg.StateDir)
	if err != nil {
		return r, err
	}
	defer unlock()
	staging := filepath.Join(cfg.StateDir, stagingDir)
	if checkRestored(cfg.StateDir) == nil {
		if err := checkNoState(cfg.StateDir); err != nil {
			return r, err
		}
	} else if err := clearInterrupted(cfg.StateDir); err != nil {
		return r, err
	}
	if err := os.Mkdir(staging, 0o700); err != nil {
		return r, fmt.Errorf("restore: %w", diskFull(err))
	}
	id, ring, err := r.stage(ctx, cfg, in, passphrase, staging)
	if err != nil {
		discardState(cfg.StateDir)
		return r, fmt.Errorf("restore: %w", diskFull(errors.Join(err, os.RemoveAll(staging))))
	}
	if err := commitRestore(cfg.StateDir, id, ring); err != nil {
		return r, fmt.Errorf("restore: %w", diskFull(err))
	}
	r.Node = cfg.Name
	return r, nil
}

// checkNoState names what a restore would have to overwrite.
func checkNoState(stateDir string) error {
	var found []string
	for _, name := range stateOf {
		if _, err := os.Lstat(filepath.Join(stateDir, name)); err == nil {
			found = append(found, name)
		}
	}
	if len(found) == 0 {
		return nil
	}
	who := ""
	if id, err := identity.Load(filepath.Join(stateDir, "identity")); err == nil {
		who = fmt.Sprintf(" of node %s of cluster %s", id.Name, id.ClusterID)
	}
	return fmt.Errorf("restore: %s holds the state%s (%s): a backup is restored on a machine without state; 'skein leave' removes it, or name another --state-dir", stateDir, who, strings.Join(found, ", "))
}

// clearInterrupted removes what an interrupted restore made; there was nothing else when it began.
func clearInterrupted(stateDir string) error {
	for _, name := range append(slices.Clone(stateOf), stagingDir) {
		if err := os.RemoveAll(filepath.Join(stateDir, name)); err != nil {
			return fmt.Errorf("restore: remove what an interrupted one left: %w", err)
		}
	}
	return nil
}

// stage builds the store in the staging directory.
func (r *Restored) stage(ctx context.Context, cfg Config, in io.Reader, passphrase []byte, staging string) (*identity.Identity, keyring.Ring, error) {
	dir := filepath.Join(staging, "raft")
	var ring keyring.Ring
	var err error
	r.BackupInfo, err = readBackup(in, backup.Handler{
		Header: func(h backup.Header) error { return sameShards(h, shard.Default()) },
		Ring: func(b backup.Box) error {
			raw, err := b.Open(passphrase)
			if err == nil && len(raw) > 0 {
				ring, err = keyring.Decode(raw)
			}
			return err
		},
		Shard: func(s backup.Shard, data io.Reader) error {
			return mvcc.PlaceImage(host.RebuildDir(dir, shard.ID(s.ID)), data)
		},
	})
	if err != nil {
		return nil, ring, err
	}
	keys, err := r.forget(ctx, host.RebuildDir(dir, shard.System), ring)
	if err != nil {
		return nil, ring, err
	}
	id, err := restoredIdentity(cfg, r.Header, keys, time.Now())
	if err != nil {
		return nil, ring, err
	}
	r.Number = r.Generation + 1
	why := fmt.Sprintf("restored from the backup of %s", r.Created.Format(time.RFC3339))
	if err := rebuildStore(ctx, cfg, id, keys.authority, dir, r.Number, why, rebaseAll); err != nil {
		return nil, ring, err
	}
	return id, ring, nil
}

// sameShards refuses a backup whose keys are distributed in another way.
func sameShards(h backup.Header, t shard.Table) error {
	text := func(names []string) string { slices.Sort(names); return strings.Join(names, "; ") }
	var theirs, ours []string
	for _, s := range h.Shards {
		theirs = append(theirs, fmt.Sprintf("%d %s %q", s.ID, s.Name, s.Prefixes))
	}
	for _, s := range t.Shards() {
		ours = append(ours, fmt.Sprintf("%d %s %q", s.ID, s.Name, s.Prefixes))
	}
	if a, b := text(theirs), text(ours); a != b {
		return fmt.Errorf("the backup has the shards %s, this version of skein has %s: restore it with version %s", a, b, h.Version)
	}
	return nil
}

// forget removes from the system shard what binds it to the nodes and tokens of the old cluster, and reads the cluster's keys. Tokens
// go because one that was revoked after the backup would be valid again.
func (r *Restored) forget(ctx context.Context, dir string, ring keyring.Ring) (keys clusterKeys, err error) {
	m := mvcc.New(mvcc.Config{Dir: dir})
	if _, err := m.Open(nil); err != nil {
		return keys, err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if keys, err = storedKeys(ctx, m, ring); err != nil {
		return keys, err
	}
	claims, err := m.Range(ctx, &pb.RangeRequest{Key: []byte(join.ClaimPrefix), RangeEnd: []byte(prefixEnd(join.ClaimPrefix)), KeysOnly: true})
	if err != nil {
		return keys, err
	}
	marks := map[string][]byte{}
	for _, kv := range claims.Kvs {
		name := strings.TrimPrefix(string(kv.Key), join.ClaimPrefix)
		marks[forgottenPrefix+name] = []byte(`{"version":1}`)
		r.Forgotten = append(r.Forgotten, name)
	}
	m.Edit([]string{join.ClaimPrefix, join.TokenPrefix, "/skein/members/"}, marks)
	return keys, nil
}

// storedKeys reads the cluster's keys from a store that no log drives.
func storedKeys(ctx context.Context, m *mvcc.Machine, ring keyring.Ring) (clusterKeys, error) {
	got, err := m.Range(ctx, &pb.RangeRequest{Key: []byte(keysKey)})
	if err != nil {
		return clusterKeys{}, err
	}
	if len(got.Kvs) == 0 {
		return clusterKeys{}, errNoKeys
	}
	return openKeys(got.Kvs[0].Value, ring)
}

// prefixEnd ends the range of a prefix that ends in a slash.
func prefixEnd(p string) string { return p[:len(p)-1] + "0" }

// restoredIdentity makes this node a member of the old cluster with keys of its own: nodes that were its members before and live
// on cannot gossip with it.
func restoredIdentity(cfg Config, h backup.Header, keys clusterKeys, now time.Time) (*identity.Identity, error) {
	if h.Cluster != identity.CAClusterID(keys.authority.Cert) {
		return nil, fmt.Errorf("the backup is of cluster %q, the CA in it of %q", h.Cluster, identity.CAClusterID(keys.authority.Cert))
	}
	for _, p := range []netip.Prefix{h.Settings.PodCIDR, h.Settings.ServiceCIDR} {
		if p.Contains(cfg.Address) {
			return nil, fmt.Errorf("address %s lies inside %s, which the cluster gives to pods or Services", cfg.Address, p)
		}
	}
	key, err := identity.NewKey()
	if err != nil {
		return nil, fmt.Errorf("node key: %w", err)
	}
	der, err := identity.NewNodeCSR(key, cfg.Name)
	if err != nil {
		return nil, err
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("node certificate: %w", err)
	}
	cert, err := keys.authority.SignNode(csr, cfg.Name, []netip.Addr{cfg.Address}, now)
	if err != nil {
		return nil, err
	}
	gossipKey, err := identity.NewGossipKey()
	if err != nil {
		return nil, err
	}
	id := &identity.Identity{Name: cfg.Name, ClusterID: h.Cluster, Key: key, Cert: cert, CA: keys.authority.Cert, GossipKey: gossipKey, Cluster: h.Settings}
	return id, id.Validate()
}

// rebaseAll makes the databases of a backup the beginning of new Raft groups.
func rebaseAll(dir, why string) error {
	for _, s := range shard.Default().Shards() {
		if _, err := mvcc.Rebase(host.RebuildDir(dir, s.ID), revisionBump, why); err != nil {
			return err
		}
	}
	return nil
}

// rebuildStore makes a store of one voter, this node, of the databases in dir, after prepare has had them.
func rebuildStore(ctx context.Context, cfg Config, id *identity.Identity, ca *identity.Authority, dir string, number uint64, why string, prepare func(dir, why string) error) error {
	if err := prepare(dir, why); err != nil {
		return err
	}
	proof, err := ca.SignGeneration(identity.Generation{Number: number, Node: cfg.Name, Time: time.Now().UTC().Truncate(time.Second), Why: why})
	if err != nil {
		return err
	}
	if err := host.WriteGeneration(dir, proof); err != nil {
		return err
	}
	hostID, err := hostIDOf(id.Key.Public())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, rebuildTimeout)
	defer cancel()
	return host.Rebuild(ctx, host.Config{
		NodeName: cfg.Name, NodeHostID: hostID, Dir: dir, Logger: cfg.Logger,
		VerifyGeneration: func(proof []byte) (uint64, error) {
			g, err := identity.VerifyGeneration(id.CA, proof)
			return g.Number, err
		},
	})
}

// rebuildTimeout bounds what takes a second, and longer only on a disk that hardly works.
const rebuildTimeout = 2 * time.Minute

// commitRestore moves the prepared state into its place. The staging directory goes last: as long as it is there nothing starts.
func commitRestore(stateDir string, id *identity.Identity, ring keyring.Ring) error {
	staging := filepath.Join(stateDir, stagingDir)
	if err := os.Rename(filepath.Join(staging, "raft"), filepath.Join(stateDir, "raft")); err != nil {
		return err
	}
	if err := id.Save(filepath.Join(stateDir, "identity")); err != nil {
		return err
	}
	if !ring.Empty() {
		if err := keyring.Save(ringFile(stateDir), ring); err != nil {
			return err
		}
	}
	if err := syncDir(stateDir); err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(staging), syncDir(stateDir))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
