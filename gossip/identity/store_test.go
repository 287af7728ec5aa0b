package identity

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestSaveAndLoad(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "identity")
	if _, err := Load(dir); !errors.Is(err, ErrNoIdentity) {
		t.Fatalf("before any save: %v", err)
	}
	first := testIdentity(t, testAuthority(t, "c1"), "n1")
	second := testIdentity(t, testAuthority(t, "c2"), "n2")
	for _, want := range []*Identity{first, second} { // the second replaces the first
		if err := want.Save(dir); err != nil {
			t.Fatal(err)
		}
		got, err := Load(dir)
		if err != nil {
			t.Fatal(err)
		}
		if got.Name != want.Name || got.ClusterID != want.ClusterID || !got.Key.Equal(want.Key) || !got.Cert.Equal(want.Cert) ||
			!got.CA.Equal(want.CA) || string(got.GossipKey) != string(want.GossipKey) || got.Cluster != want.Cluster ||
			len(got.Seeds) != 1 || got.Seeds[0] != want.Seeds[0] {
			t.Errorf("loaded %+v, saved %+v", got, want)
		}
	}
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory mode %v, %v", info.Mode(), err)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 4 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, f := range files {
		if info, err := f.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", f.Name(), info.Mode(), err)
		}
	}
	if rest, _ := os.ReadDir(filepath.Dir(dir)); len(rest) != 1 {
		t.Errorf("something was left beside the identity: %v", rest)
	}
}

func TestSaveRefusesFaultyIdentity(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "identity")
	i := testIdentity(t, testAuthority(t, "c1"), "n1")
	other := testIdentity(t, testAuthority(t, "c1"), "n2")
	i.Key, i.GossipKey = other.Key, nil
	err := i.Save(dir)
	if err == nil || !strings.Contains(err.Error(), "another key") || !strings.Contains(err.Error(), "gossip key") {
		t.Errorf("error %v should name both faults", err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("a faulty identity left something: %v", err)
	}
}

func TestSaveInMissingParentLeavesNothing(t *testing.T) {
	parent := filepath.Join(t.TempDir(), "missing")
	if err := testIdentity(t, testAuthority(t, "c1"), "n1").Save(filepath.Join(parent, "identity")); err == nil {
		t.Fatal("saved into a directory that does not exist")
	}
}

// A crash can come between the two renames of a save, or before them.
func TestLoadAfterInterruptedSave(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "identity")
	i := testIdentity(t, testAuthority(t, "c1"), "n1")
	if err := i.Save(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir+".new-1", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dir, dir+".old"); err != nil {
		t.Fatal(err)
	}
	got, err := Load(dir)
	if err != nil || got.Name != "n1" {
		t.Fatalf("the former identity is lost: %v", err)
	}
	// After the second rename the old directory may still be there.
	if err := os.Mkdir(dir+".old", 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(dir); err != nil {
		t.Fatal(err)
	}
	if rest, _ := os.ReadDir(filepath.Dir(dir)); len(rest) != 1 {
		t.Errorf("left-overs were not removed: %v", rest)
	}
}

func TestLoadNamesTheBadFile(t *testing.T) {
	i := testIdentity(t, testAuthority(t, "c1"), "n1")
	other := testIdentity(t, testAuthority(t, "c1"), "n1")
	otherKey, err := EncodeKey(other.Key)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, data []byte) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	edit := func(field string, value any) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			data, err := os.ReadFile(filepath.Join(dir, clusterFile))
			if err != nil {
				t.Fatal(err)
			}
			record := map[string]any{}
			if err := json.Unmarshal(data, &record); err != nil {
				t.Fatal(err)
			}
			record[field] = value
			if data, err = json.Marshal(record); err != nil {
				t.Fatal(err)
			}
			write(clusterFile, data)(t, dir)
		}
	}
	for _, c := range []struct {
		name string
		harm func(*testing.T, string)
		want []string
	}{
		{"missing key", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, keyFile)) }, []string{keyFile, "no such file"}},
		{"empty key", write(keyFile, nil), []string{keyFile, "no PEM"}},
		{"another key", write(keyFile, otherKey), []string{"another key"}},
		{"certificate cut off", write(certFile, EncodeCert(i.Cert)[:200]), []string{certFile, "no PEM"}},
		{"certificate of another CA", write(certFile, EncodeCert(other.Cert)), []string{"not made by the cluster's CA"}},
		{"another CA", write(caFile, EncodeCert(other.CA)), []string{caFile, "not the CA that"}},
		{"no CA", write(caFile, EncodeCert(i.Cert)), []string{caFile, "not a CA"}},
		{"broken JSON", write(clusterFile, []byte("{")), []string{clusterFile, "unexpected end"}},
		{"no version", edit("version", 0), []string{clusterFile, "no version"}},
		{"newer version", edit("version", 9), []string{clusterFile, "newer skein"}},
		{"another name", edit("name", "n2"), []string{"not for node \"n2\""}},
		{"short gossip key", edit("gossipKey", "AAAA"), []string{"3 bytes instead of 32"}},
		{"huge file", write(clusterFile, make([]byte, maxFileSize+1)), []string{clusterFile, "not a file that skein wrote"}},
		{"directory as file", func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, keyFile))
			os.Mkdir(filepath.Join(dir, keyFile), 0o700)
		}, []string{keyFile, "not a file that skein wrote"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "identity")
			if err := i.Save(dir); err != nil {
				t.Fatal(err)
			}
			c.harm(t, dir)
			_, err := Load(dir)
			if err == nil || errors.Is(err, ErrNoIdentity) {
				t.Fatalf("error %v", err)
			}
			for _, want := range append(c.want, "join the cluster again", dir) {
				if !strings.Contains(fmt.Sprint(err), want) {
					t.Errorf("error %q does not say %q", err, want)
				}
			}
		})
	}
	// A field of a newer build is no reason to refuse.
	dir := filepath.Join(t.TempDir(), "identity")
	if err := i.Save(dir); err != nil {
		t.Fatal(err)
	}
	edit("fromTheFuture", true)(t, dir)
	if _, err := Load(dir); err != nil {
		t.Errorf("an unknown field was refused: %v", err)
	}
}

func FuzzDecodeCluster(f *testing.F) {
	files, err := testIdentity(f, testAuthority(f, "c1"), "n1").files()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(files[clusterFile])
	f.Add([]byte(`{"version":1}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		record, err := decodeCluster(data)
		if err == nil && (record.Version < 1 || record.Version > clusterVersion) {
			t.Fatalf("version %d was accepted", record.Version)
		}
	})
}
