package identity

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
)

// The files of an identity.
const (
	keyFile     = "node.key"
	certFile    = "node.crt"
	caFile      = "ca.crt"
	clusterFile = "cluster.json"

	clusterVersion = 1       // of cluster.json
	maxFileSize    = 1 << 20 // no file of ours is near it
)

// ErrNoIdentity says that there is no identity on disk: the node has to found or join a cluster.
var ErrNoIdentity = errors.New("this node has no identity yet")

// clusterRecord is cluster.json. Fields that are not known are ignored when it is read, so a newer build may add some.
type clusterRecord struct {
	Version   int              `json:"version"`
	Name      string           `json:"name"`
	ClusterID string           `json:"clusterID"`
	CAHash    string           `json:"caHash"` // hex; ties the file to ca.crt
	GossipKey []byte           `json:"gossipKey"`
	Cluster   Cluster          `json:"cluster"`
	Seeds     []netip.AddrPort `json:"seeds,omitempty"`
}

// Save writes the identity to dir, which is made (0700; its files 0600) if it does not exist; its parent must. The directory
// is built aside, synced, and put in place by a rename, so that dir is always one whole identity: the former, the new one, or,
// for a moment between two renames, the former under a name that [Load] knows. Other files of a former identity go with it.
func (i *Identity) Save(dir string) error {
	if err := i.Validate(); err != nil {
		return fmt.Errorf("identity %s: not saved, it is faulty: %w", dir, err)
	}
	dir = filepath.Clean(dir)
	files, err := i.files()
	if err != nil {
		return fmt.Errorf("identity %s: %w", dir, err)
	}
	if err := restore(dir); err != nil {
		return err
	}
	parent := filepath.Dir(dir)
	fresh, err := os.MkdirTemp(parent, filepath.Base(dir)+".new-") // 0700
	if err != nil {
		return fmt.Errorf("identity %s: %w", dir, err)
	}
	defer os.RemoveAll(fresh) // finds nothing once the rename below has happened
	for name, data := range files {
		if err := writeSynced(filepath.Join(fresh, name), data); err != nil {
			return fmt.Errorf("identity %s: %w", dir, err)
		}
	}
	if err := syncDir(fresh); err != nil {
		return fmt.Errorf("identity %s: %w", dir, err)
	}
	if err := replaceDir(fresh, dir); err != nil {
		return fmt.Errorf("identity %s: %w", dir, err)
	}
	return nil
}

// SaveCert replaces the certificate of the identity in dir, and nothing else there: a crash leaves the old one or the new one.
func SaveCert(dir string, cert *x509.Certificate) error {
	return replaceFile(filepath.Join(dir, certFile), EncodeCert(cert))
}

// SaveCluster replaces what the identity in dir knows of its cluster, and nothing else there.
func (i *Identity) SaveCluster(dir string) error {
	if err := i.Validate(); err != nil {
		return fmt.Errorf("identity %s: not saved, it is faulty: %w", dir, err)
	}
	files, err := i.files()
	if err != nil {
		return fmt.Errorf("identity %s: %w", dir, err)
	}
	return replaceFile(filepath.Join(dir, clusterFile), files[clusterFile])
}

func replaceFile(path string, data []byte) error {
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) { // of an interrupted call
		return fmt.Errorf("identity file %s: %w", path, err)
	}
	err := writeSynced(fresh, data)
	if err == nil {
		err = os.Rename(fresh, path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("identity file %s: %w", path, err)
	}
	return nil
}

// CertPath and KeyPath are the files of the certificate and its key in the directory of an identity, for libraries that read them.
func CertPath(dir string) string { return filepath.Join(dir, certFile) }

// KeyPath see CertPath.
func KeyPath(dir string) string { return filepath.Join(dir, keyFile) }

func (i *Identity) files() (map[string][]byte, error) {
	key, err := EncodeKey(i.Key)
	if err != nil {
		return nil, err
	}
	hash := CertHash(i.CA)
	record, err := json.MarshalIndent(clusterRecord{
		Version: clusterVersion, Name: i.Name, ClusterID: i.ClusterID, CAHash: hex.EncodeToString(hash[:]),
		GossipKey: i.GossipKey, Cluster: i.Cluster, Seeds: i.Seeds,
	}, "", "  ")
	if err != nil {
		return nil, err
	}
	return map[string][]byte{
		keyFile: key, certFile: EncodeCert(i.Cert), caFile: EncodeCert(i.CA), clusterFile: append(record, '\n'),
	}, nil
}

// Load reads the identity that [Identity.Save] wrote to dir. It is [ErrNoIdentity] if there is none; every other error names
// the file that is bad and says what to do. Directories that an interrupted Save left are removed, so only one process may
// use dir at a time.
func Load(dir string) (*Identity, error) {
	dir = filepath.Clean(dir)
	if err := restore(dir); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && len(entries) == 0:
		return nil, fmt.Errorf("identity %s: %w", dir, ErrNoIdentity)
	case err != nil:
		return nil, fmt.Errorf("identity %s: %w", dir, err)
	}
	var data [4][]byte
	for n, name := range []string{clusterFile, caFile, certFile, keyFile} {
		if data[n], err = readFile(dir, name); err != nil {
			return nil, err
		}
	}
	record, err := decodeCluster(data[0])
	if err != nil {
		return nil, badFile(dir, clusterFile, err)
	}
	i := &Identity{
		Name: record.Name, ClusterID: record.ClusterID, GossipKey: record.GossipKey,
		Cluster: record.Cluster, Seeds: record.Seeds,
	}
	if i.CA, err = parseCA(data[1]); err != nil {
		return nil, badFile(dir, caFile, err)
	}
	if hash := CertHash(i.CA); hex.EncodeToString(hash[:]) != record.CAHash {
		return nil, badFile(dir, caFile, fmt.Errorf("it is not the CA that %s names", clusterFile))
	}
	if i.Cert, err = ParseCert(data[2]); err != nil {
		return nil, badFile(dir, certFile, err)
	}
	if i.Key, err = ParseKey(data[3]); err != nil {
		return nil, badFile(dir, keyFile, err)
	}
	if err := i.Validate(); err != nil {
		return nil, fmt.Errorf("identity %s: its files do not belong together: %w; %s", dir, err, remedy(dir))
	}
	return i, nil
}

func decodeCluster(data []byte) (clusterRecord, error) {
	var record clusterRecord
	if err := json.Unmarshal(data, &record); err != nil {
		return record, err
	}
	switch {
	case record.Version > clusterVersion:
		return record, fmt.Errorf("it has version %d, this skein knows versions up to %d: it was written by a newer skein, which has to run here",
			record.Version, clusterVersion)
	case record.Version < 1:
		return record, errors.New("it has no version")
	}
	return record, nil
}

func readFile(dir, name string) ([]byte, error) {
	path := filepath.Join(dir, name)
	info, err := os.Stat(path)
	if err != nil {
		return nil, badFile(dir, name, err)
	}
	if !info.Mode().IsRegular() || info.Size() > maxFileSize {
		return nil, badFile(dir, name, fmt.Errorf("%s of %d bytes is not a file that skein wrote", info.Mode().Type(), info.Size()))
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, badFile(dir, name, err)
	}
	return data, nil
}

func badFile(dir, name string, err error) error {
	return fmt.Errorf("identity file %s: %w; %s", filepath.Join(dir, name), err, remedy(dir))
}

func remedy(dir string) string {
	return fmt.Sprintf("put %s back from a copy, or move it away and join the cluster again", dir)
}

// oldDir is where the former identity is while the new one takes its place.
func oldDir(dir string) string { return dir + ".old" }

// replaceDir puts fresh in dir's place. Two renames are needed if dir exists, as rename(2) does not replace a directory that
// holds something; restore mends a crash between them.
func replaceDir(fresh, dir string) error {
	parent := filepath.Dir(dir)
	if err := os.RemoveAll(oldDir(dir)); err != nil {
		return err
	}
	if err := os.Rename(dir, oldDir(dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(fresh, dir); err != nil {
		// Put the former identity back; if that fails too, restore will.
		_ = os.Rename(oldDir(dir), dir)
		return err
	}
	if err := syncDir(parent); err != nil {
		return err
	}
	return os.RemoveAll(oldDir(dir))
}

// restore finishes or undoes what an interrupted Save began.
func restore(dir string) error {
	_, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.Rename(oldDir(dir), dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("identity %s: restoring it from %s: %w", dir, oldDir(dir), err)
		}
	} else if err == nil {
		if err := os.RemoveAll(oldDir(dir)); err != nil {
			return fmt.Errorf("identity %s: %w", dir, err)
		}
	}
	siblings, err := os.ReadDir(filepath.Dir(dir))
	if err != nil {
		return nil // the parent is not there or not ours to list: what follows reports it
	}
	for _, s := range siblings {
		if !strings.HasPrefix(s.Name(), filepath.Base(dir)+".new-") {
			continue
		}
		if err := os.RemoveAll(filepath.Join(filepath.Dir(dir), s.Name())); err != nil {
			return fmt.Errorf("identity %s: removing what an interrupted save left: %w", dir, err)
		}
	}
	return nil
}

func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
