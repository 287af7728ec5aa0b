package diffapi

import (
	"strings"
	"testing"
)

func TestCases(t *testing.T) {
	areas, err := loadAreas("cases")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, a := range areas {
		n += len(a.Cases)
		kept, err := readGolden(a.Name)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range a.Cases {
			if _, ok := kept[c.ID]; !ok && !c.Setup {
				t.Errorf("%s has no kept answer: run make diff-api", c.ID)
			}
		}
	}
	if n < 2000 {
		t.Errorf("%d cases", n)
	}
	if _, err := loadAccepted("accepted.txt"); err != nil {
		t.Error(err)
	}
}

func TestParse(t *testing.T) {
	a, err := parseArea("x", "# words\n> POST /a?b=c\n@ Accept: x/y\n@ save N a.0\n@ repeat 3 z\n@ only ^1\n{\n.\n}\n\n> kubectl get 'a b' \"c'd\" -o name\n\n> kubectl get 'a b' \"c'd\" -o name\n@ sort")
	if err != nil || len(a.Cases) != 3 {
		t.Fatalf("%+v, %v", a, err)
	}
	c := a.Cases[0]
	if c.Method != "POST" || c.Path != "/a?b=c" || c.Header.Get("Accept") != "x/y" || c.Body != "{\n\n}zzz" || c.Save["N"] != "a.0" || c.Line != 2 {
		t.Errorf("%+v", c)
	}
	if k := a.Cases[1]; strings.Join(k.Kubectl, "|") != "get|a b|c'd|-o|name" || a.Cases[2].ID == k.ID || !a.Cases[2].Sort {
		t.Errorf("%+v", a.Cases[1:])
	}
	for _, bad := range []string{"x", "> rm -r /", "> GET /\n@ nosuch", "> kubectl get 'x", "> GET /\n@ only ("} {
		if _, err := parseArea("x", bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func TestMask(t *testing.T) {
	for in, want := range map[string]string{
		`"uid": "0a1b2c3d-0000-1111-2222-333344445555"`:                   `"uid": "UID"`,
		`resourceVersion: "17"`:                                           `resourceVersion: "RV"`,
		`\\\"resourceVersion\\\":\\\"17\\\"`:                              `\\\"resourceVersion\\\":\\\"RV\\\"`,
		`"resourceVersion": "0"`:                                          `"resourceVersion": "0"`,
		`at 2026-01-02T03:04:05Z`:                                         `at TIME`,
		`gen-x7k2z kube-api-access-bbbbb`:                                 `gen-RANDOM kube-api-access-RANDOM`,
		`10.96.0.7 10.96.31.7`:                                            `10.96.0.7 CLUSTER-IP`,
		`80:30080/TCP 80:31234/TCP`:                                       `80:30080/TCP 80:NODE-PORT/TCP`,
		`https://127.0.0.1:4711/x`:                                        `https://SERVER/x`,
		`Bearer eyJhbGciOiJFUzI1NiJ9.eyJhdWQiOlsiYSJdfQ.c2lnbmF0dXJl end`: `Bearer TOKEN end`,
	} {
		if got := mask(in, "127.0.0.1:4711"); got != want {
			t.Errorf("%s becomes %s, want %s", in, got, want)
		}
	}
	if got := maskAges("web   2/2   2m3s   17s\nx (5s ago)\n324d x 2y30d"); got != "web 2/2 AGE AGE\nx (AGE ago)\nAGE x AGE" {
		t.Errorf("%q", got)
	}
}

func TestCompare(t *testing.T) {
	list, err := parseAccepted("## why\ncase a: .*\n- up\n+ sk.*\n+ never")
	if err != nil {
		t.Fatal(err)
	}
	if lines, n := unexplained("a: x", "same\nup\nend", "same\nskein\nend", list); len(lines) != 0 || n != 2 {
		t.Errorf("%q, %d", lines, n)
	}
	if lines, _ := unexplained("b: x", "same\nup\nend", "same\nskein\nend", list); strings.Join(lines, ",") != "- up,+ skein" {
		t.Errorf("%q", lines)
	}
	if err := unused(list); err == nil || !strings.Contains(err.Error(), "never") || strings.Contains(err.Error(), "sk.*") {
		t.Errorf("%v", err)
	}
	for _, bad := range []string{"case x\n- y", "## why\ncase (\n", "- y", "nonsense"} {
		if _, err := parseAccepted(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
	if d := diff([]string{"a", "b", "c", "d"}, []string{"a", "x", "c", "d", "e"}); strings.Join(d, ",") != "- b,+ x,+ e" {
		t.Errorf("%q", d)
	}
}

func TestGolden(t *testing.T) {
	a, err := parseArea("x", "> GET /a\n\n> GET /b\n@ setup\n\n> GET /c\n@ digest")
	if err != nil {
		t.Fatal(err)
	}
	kept := parseGolden(formatGolden(a, []string{"200\n\nbody", "no", "long"}))
	if len(kept) != 2 || kept["x: GET /a"] != "200\n\nbody" || kept["x: GET /c"] != digestOf("long") {
		t.Errorf("%q", kept)
	}
}

func TestSortManaged(t *testing.T) {
	for in, want := range map[string]string{
		"{\n  \"managedFields\": [\n    {\n      \"b\": 1\n    },\n    {\n      \"a\": 1\n    }\n  ],\n  \"x\": 1\n}": "{\n  \"managedFields\": [\n    {\n      \"a\": 1\n    }\n    {\n      \"b\": 1\n    }\n  ],\n  \"x\": 1\n}",
		"metadata:\n  managedFields:\n  - b: 1\n    c:\n      d: 1\n  - a: 1\n  name: x":                              "metadata:\n  managedFields:\n  - a: 1\n  - b: 1\n    c:\n      d: 1\n  name: x",
		"managedFields: []\nx": "managedFields: []\nx",
	} {
		if got := sortManaged(in); got != want {
			t.Errorf("%s\nbecomes\n%s", in, got)
		}
	}
}
