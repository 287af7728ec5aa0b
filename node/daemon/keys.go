package daemon

import (
	"context"
	"crypto/ecdsa"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	clientv3 "go.etcd.io/etcd/client/v3"

	"skein.io/skein/gossip/identity"
)

// keysKey is where the store keeps the cluster's keys: only replicas can read it.
const keysKey = "/skein/cluster/keys"

const keysVersion = 1

// clusterKeys are the secrets that make a node able to serve the API: the CA that signs certificates and the key that signs
// ServiceAccount tokens.
type clusterKeys struct {
	authority *identity.Authority
	sa        *ecdsa.PrivateKey
}

// keysRecord is the stored form; the founding node keeps the same on disk until the store has it.
type keysRecord struct {
	Version int    `json:"version"`
	CACert  []byte `json:"caCert"`
	CAKey   []byte `json:"caKey"`
	SAKey   []byte `json:"saKey"`
}

func (k clusterKeys) encode() ([]byte, error) {
	caKey, err := k.authority.KeyPEM()
	if err != nil {
		return nil, fmt.Errorf("cluster keys: %w", err)
	}
	saKey, err := identity.EncodeKey(k.sa)
	if err != nil {
		return nil, fmt.Errorf("cluster keys: %w", err)
	}
	return json.Marshal(keysRecord{Version: keysVersion, CACert: k.authority.CertPEM(), CAKey: caKey, SAKey: saKey})
}

func decodeKeys(b []byte) (k clusterKeys, err error) {
	var r keysRecord
	if err := json.Unmarshal(b, &r); err != nil {
		return k, fmt.Errorf("cluster keys: %w", err)
	}
	if r.Version != keysVersion {
		return k, fmt.Errorf("cluster keys have version %d, this skein knows version %d: upgrade this node", r.Version, keysVersion)
	}
	if k.authority, err = identity.ParseAuthority(r.CACert, r.CAKey); err != nil {
		return k, fmt.Errorf("cluster keys: CA: %w", err)
	}
	if k.sa, err = identity.ParseKey(r.SAKey); err != nil {
		return k, fmt.Errorf("cluster keys: ServiceAccount key: %w", err)
	}
	return k, nil
}

// errNoKeys says that the founding node has not put the keys into the store yet.
var errNoKeys = errors.New("the store has no cluster keys yet")

func readKeys(ctx context.Context, kv clientv3.KV) (clusterKeys, error) {
	r, err := kv.Get(ctx, keysKey)
	if err != nil {
		return clusterKeys{}, fmt.Errorf("cluster keys: %w", err)
	}
	if len(r.Kvs) == 0 {
		return clusterKeys{}, errNoKeys
	}
	return decodeKeys(r.Kvs[0].Value)
}

// founding is the file that makes the first start of a first node safe to interrupt: the keys exist only in it until the
// store has them.
type founding struct{ path string }

func foundingFile(stateDir string) founding {
	return founding{filepath.Join(stateDir, "founding.json")}
}

func (f founding) save(k clusterKeys) error {
	b, err := k.encode()
	if err != nil {
		return err
	}
	if err := writeFile(f.path, b); err != nil {
		return fmt.Errorf("%s: %w", f.path, err)
	}
	return nil
}

// load returns the keys of a founding that is not finished; false when there is none.
func (f founding) load() (k clusterKeys, pending bool, err error) {
	b, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return k, false, nil
	}
	if err != nil {
		return k, false, err
	}
	if k, err = decodeKeys(b); err != nil {
		return k, false, fmt.Errorf("%s: %w", f.path, err)
	}
	return k, true, nil
}

// finish puts the keys into the store, if they are not there, and removes the file.
func (f founding) finish(ctx context.Context, kv clientv3.KV, k clusterKeys) error {
	b, err := k.encode()
	if err != nil {
		return err
	}
	if _, err := kv.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(keysKey), "=", 0)).Then(clientv3.OpPut(keysKey, string(b))).Commit(); err != nil {
		return fmt.Errorf("cluster keys: %w", err)
	}
	if err := os.Remove(f.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// writeFile writes a private file durably: a crash leaves the old one or the new one.
func writeFile(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".new-") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // finds nothing after the rename
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
