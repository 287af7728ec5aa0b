package diffapi

import (
	"fmt"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// random is what Kubernetes makes generated names of.
const random = `[bcdfghjklmnpqrstvwxz2456789]{5}`

// masks replace what differs from run to run.
var masks = []struct {
	find *regexp.Regexp
	put  string
}{
	{regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`), "UID"},
	{regexp.MustCompile(`\b20\d\d-[01]\d-[0-3]\dT[0-2]\d:\d\d:\d\d(\.\d+)?Z`), "TIME"},
	{regexp.MustCompile(`\b(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d \w{3} 20\d\d [\d:]+ \+0000`), "TIME"},
	{regexp.MustCompile(`\b192\.0\.2\.10:\d+`), "ADVERTISED"},
	{regexp.MustCompile(`\b(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d \w{3} 20\d\d [\d:]+ GMT`), "TIME"},
	{regexp.MustCompile(`X509SHA256=[0-9a-f]{64}`), "X509SHA256=HASH"},
	{regexp.MustCompile(`in record \(\d+\)`), "in record (RV)"},
	{regexp.MustCompile(`, current: \d+`), ", current: RV"},
	{regexp.MustCompile(`(?m)^(\s+- )(\d+s|\d+m(\d+s)?)$`), "${1}AGE"},
	{regexp.MustCompile(`((?:resourceVersion|ResourceVersion|resource_version)\\*"?: ?\\*"?)[1-9][0-9]*`), "${1}RV"},
	{regexp.MustCompile(`(gen-|debugger-|node-debugger-[a-z0-9-]*|kube-api-access-|Bad_|n{40,})` + random + `\b`), "${1}RANDOM"},
	{regexp.MustCompile(`eyJ[A-Za-z0-9_=-]{10,}(\.[A-Za-z0-9_-]+)*`), "TOKEN"},
	{regexp.MustCompile(`\b10\.96\.([1-9]\d*)\.\d+\b`), "CLUSTER-IP"},
	{regexp.MustCompile(`(?s)-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----`), "CERTIFICATE"},
	{regexp.MustCompile(`LS0tLS1CRUdJTiBD[A-Za-z0-9+/=]+`), "CERTIFICATE"},
}

var (
	port = regexp.MustCompile(`\b3[0-2]\d{3}\b`)
	// Ages are in tables only, where a column of durations looks the same: masked as well.
	ageInText  = regexp.MustCompile(`(^|[\s(])(\d+s|\d+m(\d+s)?|\d+d|\d+y(?:\d+d)?)( ago|)($|[\s)])`)
	ageInTable = regexp.MustCompile(`(?m)^(\s+)"(\d+s|\d+m(\d+s)?|\d+d|\d+y(?:\d+d)?)"(,?)$`)
	blanks     = regexp.MustCompile(`  +`)
)

// mask makes one text out of all that mean the same. host is the server's own address.
func mask(text, host string) string {
	text = strings.ReplaceAll(text, host, "SERVER")
	if _, p, err := net.SplitHostPort(host); err == nil {
		text = regexp.MustCompile(`\b(port|targetPort): `+p+`\b`).ReplaceAllString(text, "$1: PORT")
	}
	for _, m := range masks {
		text = m.find.ReplaceAllString(text, m.put)
	}
	// Node ports that were asked for are below the band that others come from.
	return port.ReplaceAllStringFunc(text, func(p string) string {
		if n, err := strconv.Atoi(p); err == nil && n >= 30086 && n <= 32767 {
			return "NODE-PORT"
		}
		return p
	})
}

// maskAges is for what kubectl prints for people.
func maskAges(text string) string {
	lines := strings.Split(text, "\n")
	for i, l := range lines {
		// Twice: neighbours share a blank.
		for range 2 {
			l = ageInText.ReplaceAllString(l, "${1}AGE$4$5")
		}
		lines[i] = strings.TrimRight(blanks.ReplaceAllString(l, " "), " ")
	}
	return strings.Join(lines, "\n")
}

// sortManaged puts the entries of every list of managed fields in the order of their text: the server's depends on whether two writes fell into
// one second.
func sortManaged(text string) string {
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		word := strings.TrimLeft(lines[i], " ")
		indent := lines[i][:len(lines[i])-len(word)]
		first := indent + "- " // of an entry in YAML
		switch word {
		case `"managedFields": [`:
			first = indent + "  {"
		case "managedFields:":
		default:
			continue
		}
		var entries []string
		end := i + 1
		for ; end < len(lines) && (strings.HasPrefix(lines[end], first) || strings.HasPrefix(lines[end], indent+"  ")); end++ {
			l := lines[end]
			if l == indent+"  }," {
				l = indent + "  }"
			}
			if strings.HasPrefix(l, first) || len(entries) == 0 {
				entries = append(entries, l)
				continue
			}
			entries[len(entries)-1] += "\n" + l
		}
		slices.Sort(entries)
		lines = slices.Replace(lines, i+1, end, entries...)
		i += len(entries)
	}
	return strings.Join(lines, "\n")
}

// ignored are headers that differ by nature.
var ignored = []string{"Audit-Id", "Date", "Content-Length", "X-Kubernetes-Pf-Flowschema-Uid", "X-Kubernetes-Pf-Prioritylevel-Uid", "Expires"}

// showHeader gives the headers that count, sorted.
func showHeader(h http.Header) string {
	var lines []string
	for name, values := range h {
		if slices.Contains(ignored, name) {
			continue
		}
		for _, v := range values {
			lines = append(lines, fmt.Sprintf("%s: %s\n", name, v))
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// pick keeps the lines of a raw output that a case is about. Before anything else: the rest may be megabytes.
func (c *Case) pick(out string) string {
	if c.Only == nil {
		return out
	}
	return strings.Join(slices.DeleteFunc(strings.Split(out, "\n"), func(l string) bool { return !c.Only.MatchString(l) }), "\n")
}

// shape applies the other directives of a case to its masked output.
func (c *Case) shape(out string) string {
	if c.Cut != nil {
		out = c.Cut.ReplaceAllString(out, "")
	}
	lines := strings.Split(strings.TrimRight(out, "\n"), "\n")
	lines = slices.DeleteFunc(lines, func(l string) bool { return c.Drop != nil && c.Drop.MatchString(l) })
	if c.Sort {
		slices.Sort(lines)
	}
	return strings.Join(lines, "\n")
}
