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

	"skein.io/skein/consensus/keyring"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/node/keys"
)

// keysKey is where the store keeps the cluster's keys, sealed with the key ring. Clusters of the first version have them unsealed until
// the first leader of this one seals them.
const keysKey = "/skein/cluster/keys"

const keysVersion = 1

// clusterKeys are the secrets that make a node able to serve the API: the CA that signs certificates and the key that signs
// ServiceAccount tokens.
type clusterKeys struct {
	authority *identity.Authority
	sa        *ecdsa.PrivateKey
}

// keysRecord is the form before it is sealed; the founding node keeps the same, with the ring, on disk until the store has it.
type keysRecord struct {
	Version int             `json:"version"`
	CACert  []byte          `json:"caCert"`
	CAKey   []byte          `json:"caKey"`
	SAKey   []byte          `json:"saKey"`
	Ring    json.RawMessage `json:"ring,omitempty"` // in the founding file only
}

func (k clusterKeys) encode() ([]byte, error) {
	r, err := k.record()
	if err != nil {
		return nil, err
	}
	return json.Marshal(r)
}

func (k clusterKeys) record() (r keysRecord, err error) {
	caKey, err := k.authority.KeyPEM()
	if err != nil {
		return r, fmt.Errorf("cluster keys: %w", err)
	}
	saKey, err := identity.EncodeKey(k.sa)
	if err != nil {
		return r, fmt.Errorf("cluster keys: %w", err)
	}
	return keysRecord{Version: keysVersion, CACert: k.authority.CertPEM(), CAKey: caKey, SAKey: saKey}, nil
}

// seal is the stored form.
func (k clusterKeys) seal(ring keyring.Ring) ([]byte, error) {
	b, err := k.encode()
	if err != nil {
		return nil, err
	}
	return ring.Seal(keysKey, b)
}

// openKeys reads the stored form, sealed or of the first version.
func openKeys(b []byte, ring keyring.Ring) (clusterKeys, error) {
	if _, sealed := keyring.SealedBy(b); sealed {
		var err error
		if b, err = ring.Open(keysKey, b); err != nil {
			return clusterKeys{}, fmt.Errorf("cluster keys: %w", err)
		}
	}
	return decodeKeys(b)
}

func decodeKeys(b []byte) (k clusterKeys, err error) {
	var r keysRecord
	if err := json.Unmarshal(b, &r); err != nil {
		return k, errors.New("cluster keys: not the JSON of a record") // the decoder's own words may quote a key
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

func readKeys(ctx context.Context, kv clientv3.KV, ring keyring.Ring) (clusterKeys, error) {
	r, err := kv.Get(ctx, keysKey)
	if err != nil {
		return clusterKeys{}, fmt.Errorf("cluster keys: %w", err)
	}
	if len(r.Kvs) == 0 {
		return clusterKeys{}, errNoKeys
	}
	return openKeys(r.Kvs[0].Value, ring)
}

// founding is the file that makes the first start of a first node safe to interrupt: the keys and the key ring exist only in it
// until the store has the keys and the node the ring.
type founding struct{ path string }

func foundingFile(stateDir string) founding {
	return founding{filepath.Join(stateDir, "founding.json")}
}

func (f founding) save(k clusterKeys, ring keyring.Ring) error {
	r, err := k.record()
	if err != nil {
		return err
	}
	r.Ring = ring.Encode()
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := writeFile(f.path, b); err != nil {
		return fmt.Errorf("%s: %w", f.path, err)
	}
	return nil
}

// load returns the keys and the ring of a founding that is not finished; false when there is none.
func (f founding) load() (k clusterKeys, ring keyring.Ring, pending bool, err error) {
	b, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return k, ring, false, nil
	}
	if err != nil {
		return k, ring, false, err
	}
	if k, err = decodeKeys(b); err != nil {
		return k, ring, false, fmt.Errorf("%s: %w", f.path, err)
	}
	var r keysRecord
	if err := json.Unmarshal(b, &r); err == nil && r.Ring != nil {
		if ring, err = keyring.Decode(r.Ring); err != nil {
			return k, ring, false, fmt.Errorf("%s: %w", f.path, err)
		}
	}
	return k, ring, true, nil
}

// finish puts the keys, sealed, and the record of the ring into the store, if they are not there, and destroys the file. The ring must
// be on this node's disk already.
func (f founding) finish(ctx context.Context, kv clientv3.KV, k clusterKeys, ring keyring.Ring) error {
	b, err := k.seal(ring)
	if err != nil {
		return err
	}
	record := keys.Record{Primary: ring.Primary()}
	if _, err := kv.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(keysKey), "=", 0)).
		Then(clientv3.OpPut(keysKey, string(b)), clientv3.OpPut(keys.StoreKey, string(record.Encode()))).Commit(); err != nil {
		return fmt.Errorf("cluster keys: %w", err)
	}
	return keyring.Destroy(f.path)
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
